"""Runs every operation of one engine on grids of a widened copy of qkit, and prints each outcome as JSON.

Usage: widened.py ENGINE FOLDER GRID ... (a grid: element-group-rule)
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import qkit
from qkit import native, reference
from qkit.errors import QkitError
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model
from qkit.formats.packed import pack, unpack
from qkit.reference import learned
from qkit.storage.arrays import read_file
from qkit.streaming import fast_reference

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)

name, folder = sys.argv[1], Path(sys.argv[2])
assert Path(qkit.__file__).is_relative_to(folder), qkit.__file__
engine = qkit.backend(name)
outcomes = []


def build():
    """A small Llama, with weights drawn by NumPy."""
    model, random = engine.build(CONFIG), np.random.default_rng(7)
    shapes = {key: engine.to_numpy(tensor).shape for key, tensor in sorted(engine.tensors(model).items())}
    engine.fill(model, {key: random.standard_normal(shape).astype(np.float32) / 8 for key, shape in shapes.items()})
    return model


def same(made, law):
    """Whether two QTensors are the same bytes, or two arrays the same numbers (R13)."""
    if not hasattr(law, "parts"):
        return np.array_equal(np.asarray(made).astype(np.float32), np.asarray(law).astype(np.float32))
    mine, theirs = made.parts(), law.parts()
    return mine.keys() == theirs.keys() and all(mine[part].tobytes() == theirs[part].tobytes() for part in theirs)


def judge(grid, operation, check):
    """Notes whether `check()` is true, or refused with an error that names the grid."""
    try:
        outcome = "right" if check() else "wrong"
    except QkitError as error:
        named = str(grid) in str(error) or repr(grid.scale) in str(error)
        outcome = f"refused: {error}" if named else f"wrong: {error}"
    except Exception as error:
        outcome = f"wrong: {error!r}"
    outcomes.append(((spelled(grid), operation), outcome))


def spelled(grid):
    return f"{grid.element}-{grid.group}-{grid.scale}"


def arrays(grid):
    """The operations on arrays, large and small, in each type of float."""
    random = np.random.default_rng(0)
    weights = [
        random.standard_normal(shape).astype(dtype)
        for shape in ((2, 64), (64, 256))
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
    ]
    laws = [reference.quantize(w, grid) for w in weights]
    both = list(zip(weights, laws, strict=True))

    def given(w):
        return engine.from_numpy(w)

    def back(x):
        return engine.to_numpy(x)

    judge(grid, "quantize", lambda: all(same(engine.quantize(given(w), grid).map(back), q) for w, q in both))
    judge(
        grid,
        "dequantize",
        lambda: all(same(back(engine.dequantize(q.map(given))), reference.dequantize(q)) for q in laws),
    )
    judge(
        grid,
        "fake_quantize",
        lambda: all(same(back(engine.fake_quantize(given(w), grid)), reference.dequantize(q)) for w, q in both),
    )
    judge(
        grid,
        "unclipped",
        lambda: all(same(back(engine.unclipped(given(w), grid)), reference.unclipped(w, grid)) for w in weights),
    )
    judge(grid, "pack", lambda: all(same(unpack(pack(q)), q) for q in laws))
    judge(
        grid,
        "stream",
        lambda: all(
            same(unpack(native.quantize_packed(w, grid)), q) and same(fast_reference.quantize(w, grid), q)
            for w, q in both
        ),
    )


def modules(grid):
    """The operations on a model, and its files."""
    recipe = qkit.Recipe("widened", (qkit.Rule(("*",), weight=grid),))
    weights = {
        layer.path: engine.to_numpy(engine.weight(layer.module)) for layer in engine.layers(build()) if not layer.tied
    }
    saved = folder / spelled(grid)

    def codes(model):
        layers = [layer for layer in engine.layers(model) if layer.stage == "converted" and not layer.tied]
        return {layer.path: engine.unpack(layer.module).map(engine.to_numpy) for layer in layers}

    def right(model):
        found = codes(model)
        return bool(found) and all(same(q, reference.quantize(weights[path], grid)) for path, q in found.items())

    def values(model):
        return {path: reference.dequantize(reference.quantize(weights[path], grid)) for path in codes(model)}

    def prepare():
        prepared = qkit.prepare(build(), recipe)
        first = engine.logits(prepared, TOKENS)
        again = engine.logits(qkit.convert(prepared), TOKENS)
        return bool(np.abs(first - again).max() <= 1e-5 * np.abs(first).max())  # sums in another order

    def learn():
        rule = qkit.Rule(("*",), weight=grid, scales="learned", ste="masked")
        model = qkit.convert(qkit.prepare(build(), qkit.Recipe("widened", (rule,))))
        return all(
            same(q, learned.quantize(weights[path], grid, learned.initial(weights[path], grid)))
            for path, q in codes(model).items()
        )

    def save():
        return right(qkit.load(qkit.save(qkit.convert(build(), recipe), saved), backend=name))

    def dense():
        export_dense(read_model(saved), folder / f"{spelled(grid)}-dense")
        made = read_file(folder / f"{spelled(grid)}-dense" / "model.safetensors")[0]
        return all(
            same(made[f"{path}.weight"], value) for path, value in values(qkit.load(saved, backend=name)).items()
        )

    def mlx():
        out = folder / f"{spelled(grid)}-mlx"
        try:
            export_mlx(read_model(saved), out)
        except QkitError:
            assert not out.exists()
            raise
        return read_model(out).digests() == read_model(saved).digests()

    def gguf():
        out = folder / f"{spelled(grid)}.gguf"
        try:
            export_gguf(read_model(saved), out)
        except QkitError:
            assert not out.exists()
            raise
        from gguf import GGUFReader, dequantize

        stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(out).tensors}
        want = values(qkit.load(saved, backend=name))["model.layers.0.mlp.up_proj"]
        return same(stored["blk.0.ffn_up.weight"], want)

    judge(grid, "prepare", prepare)
    judge(grid, "convert", lambda: right(qkit.convert(build(), recipe)))
    judge(grid, "learn", learn)
    judge(grid, "save", save)
    judge(grid, "dense", dense)
    judge(grid, "mlx", mlx)
    judge(grid, "gguf", gguf)


for text in sys.argv[3:]:
    element, group, scale = text.split("-")
    grid = qkit.Grid(element, int(group) if group.isdecimal() else group, scale)
    arrays(grid)
    if hasattr(engine, "layers"):
        modules(grid)
print(json.dumps(outcomes))
