"""Checkpoints that tests of files share: directories of small tensors, files with any header, and quantized families."""

import json
import os

import ml_dtypes
import numpy as np
from models import make
from safetensors.numpy import save_file

import qkit
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.write import Stream, write_directory
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}

INDEX = "model.safetensors.index.json"

#: Tensors of every type and of odd sizes.
RANDOM = np.random.default_rng(0)

TENSORS = {
    "b.weight": RANDOM.standard_normal((5, 7)).astype(np.float32),
    "a.weight": RANDOM.standard_normal((3, 9)).astype(ml_dtypes.bfloat16),
    "c.odd": np.arange(5, dtype=np.uint8),
    "c.e4m3": np.arange(7).astype(ml_dtypes.float8_e4m3fn),
    "a.shape": np.array([3, 9]),
    "ünï.weight": RANDOM.standard_normal((2, 3)).astype(np.float16),
    "empty": np.zeros((0, 4), np.int32),
    "flag": np.array([True]),
}


def tensors(dtype=np.float32):
    random = np.random.default_rng(0)
    named = {f"model.layers.{i}.mlp.{name}.weight": (96, 64) for i in range(2) for name in ("up_proj", "gate_proj")}
    named |= {"model.embed_tokens.weight": (32, 64), "lm_head.weight": (32, 64), "model.norm.weight": (64,)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in named.items()}


def raw(folder, header, data=b"", length=None):
    """A file with any header."""
    for entry in folder.glob("model*"):
        entry.unlink()
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes((length or len(text)).to_bytes(8, "little") + text + data)


def entry(shape=(2,), offsets=(0, 2), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def whole(folder):
    """A sound directory of one file, in `folder`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def stream(name, array, block=11):
    data = array.tobytes()
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    return Stream(Slot(name, TYPE_NAMES[array.dtype.name], array.shape), lambda: blocks)


def write(folder, tensors=TENSORS, **options):
    options = {"metadata": {"qkit": "é"}, "files": {"config.json": b"{}"}, **options}
    write_directory(folder, [stream(name, array) for name, array in tensors.items()], **options)
    return folder


def killed_at(call, k, work, *arguments, **options):
    """Runs `work` in a child that ends, as if killed, before the k-th call of `os.<call>`; whether it came so far."""
    child = os.fork()
    if not child:
        left, real = k, getattr(os, call)

        def counted(*given, **named):
            nonlocal left
            left -= 1
            return real(*given, **named) if left else os._exit(9)

        setattr(os, call, counted)
        try:
            work(*arguments, **options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def quantized(folder, recipe, *, family="llama", **changes):
    """A checkpoint quantized with `recipe`, a name or an object, and what it was made of."""
    source = make(folder / "float", family, **changes)
    plan = make_plan(source, recipe if isinstance(recipe, qkit.Recipe) else qkit.recipe(recipe))
    quantize_directory(plan, folder / "qkit", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    return folder / "qkit"
