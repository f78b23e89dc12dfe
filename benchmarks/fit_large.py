"""A Llama of 105 million weights for fit.py, smooth.py and outliers.py, trained byte by byte on a GPU within some seconds.

It is small_llama.py's, saved as transformers' own. Another run takes other steps in these seconds, and gives another model.

Usage: python benchmarks/fit_large.py FOLDER --text FILE.npz [--device cuda] [--size 100m|30m|4m|tiny] [--seconds N] [--steps N]
       [--batch N] [--length N]

FILE.npz has the bytes `text` and `unseen`, as for fit.py. `--write-text` writes it instead: of all of Python's source files with
their tests, every tenth of which is unseen.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from small_llama import SIZES, VOCABULARY, Llama, Run, Size, train
from torch import nn

SEED, RATE = 0, 1e-3
NAMES = {
    "before_attn": "input_layernorm",
    "before_mlp": "post_attention_layernorm",
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def write_text(file: Path) -> None:
    """Writes the bytes of Python's source files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(one for one in folder.rglob("*.py") if "site-packages" not in one.parts)
    parts = [[one.read_bytes() for n, one in enumerate(files) if bool(n % 10) == seen] for seen in (True, False)]
    text, unseen = (np.frombuffer(b"".join(some), np.uint8) for some in parts)
    np.savez_compressed(file, text=text, unseen=unseen)


def as_transformers(model: nn.Module, size: Size, *, longest: int) -> nn.Module:
    """The Llama of transformers with the weights of small_llama.py's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers}
    heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.heads}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": longest, "tie_word_embeddings": False}
    made = LlamaForCausalLM(LlamaConfig(**shape, **heads, **special, **text, rms_norm_eps=1e-5))
    state = {}
    for name, tensor in model.state_dict().items():
        renamed = ".".join(NAMES.get(part, part) for part in name.split("."))
        state[renamed if renamed.startswith("lm_head") else f"model.{renamed}"] = tensor.cpu()
    made.load_state_dict(state)
    return made.eval()


def main() -> None:
    """Trains the model and saves it, with the losses of its training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--write-text", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps", type=int, default=4000, help="at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    if given.write_text:
        write_text(given.text)
        return
    size = SIZES[given.size]
    text = torch.from_numpy(np.load(given.text)["text"]).to(given.device)
    model = Llama(size, seed=SEED, longest=given.length).to(given.device)
    begin = time.perf_counter()
    run = Run(given.steps, given.batch, given.length, rate=RATE, weight_decay=0.1, seed=SEED, half=True)
    losses = train(model, text, run, seconds=given.seconds)
    print(json.dumps({"trained after": round(time.perf_counter() - begin, 1), "losses": losses[-1:]}), flush=True)
    as_transformers(model, size, longest=given.length).save_pretrained(given.folder)
    about = {"size": given.size, "steps": given.steps, "batch": given.batch, "losses": losses}
    about["seconds"] = round(time.perf_counter() - begin, 1)
    (given.folder / "training.json").write_text(json.dumps(about), encoding="utf-8")
    print(json.dumps({**about, "losses": losses[-1:]}), flush=True)


if __name__ == "__main__":
    main()
