"""Run as a script, in a process that cannot import qkit: opens directories in other programs and keeps their logits.

python outside.py READER TOKENS OUT DIR...     READER: transformers, transformers-told, mlx-lm or gguf
"""

import importlib.abc
import json
import sys
from pathlib import Path

import numpy as np


class Nobody(importlib.abc.MetaPathFinder):
    """Finds that there is no qkit: an editable install would put it on the path of this environment."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("qkit", "qkit_mlx", "qkit_torchao", "qkit_recipes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def with_transformers(folder, tokens, **arguments):
    """Float32 logits of the directory in transformers, in the type that its configuration names."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **arguments).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy(), ""


def with_transformers_told(folder, tokens):
    """The same, asked to decode the weights when it loads them."""
    from transformers import CompressedTensorsConfig

    return with_transformers(folder, tokens, quantization_config=CompressedTensorsConfig(dequantize=True))


def with_gguf(file, tokens):
    """The same of a GGUF file: the reader decodes it to float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy(), ""


def with_mlx_lm(folder, tokens):
    """Float32 logits of the directory in mlx-lm, and some text that it generated."""
    import mlx.core as mx
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    text = generate(model, tokenizer, prompt="once", max_tokens=4)
    return np.array(model(mx.array(tokens)).astype(mx.float32)), text


READERS = {
    "transformers": with_transformers,
    "transformers-told": with_transformers_told,
    "gguf": with_gguf,
    "mlx-lm": with_mlx_lm,
}


def main():
    """Opens every directory; what cannot be opened is kept as the error."""
    reader, tokens, out, *folders = sys.argv[1:]
    found, said = {}, {}
    for folder in folders:
        try:
            found[folder], said[folder] = READERS[reader](Path(folder), np.load(tokens))
        except Exception as error:
            said[folder] = f"{type(error).__name__}: {error}"
    np.savez(out, **found)
    print("\n" + json.dumps(said))


if __name__ == "__main__":
    sys.meta_path.insert(0, Nobody())
    try:
        import qkit  # noqa: F401
    except ModuleNotFoundError:
        main()
    else:
        raise SystemExit("qkit can be imported here: this proves nothing")
