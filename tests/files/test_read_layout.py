"""Weights on read grids in files: an artifact gives every number back, and GGUF holds the same values or is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from foreign import rewritten
from safetensors import safe_open
from safetensors.numpy import load_file

import qkit
from qkit import reference
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.verify import verify
from qkit.exchange.diff import compare
from qkit.exchange.import_model import read_model
from qkit.formats import compressed_tensors, gguf, read_layout
from qkit.formats.packed import pack, unpack
from qkit.grid import Grid
from qkit.rules import Rule
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors

each_grid = pytest.mark.parametrize("grid", read_grids(), ids=str)


def storable(q):
    """`q` with zero points of as many bits as codes have: compressed-tensors and GGUF store no larger ones."""
    return q if q.zeros is None else replace(q, zeros=np.minimum(q.zeros, np.uint8(q.grid.element.levels)))


def same(one, other):
    assert one.parts().keys() == other.parts().keys()
    for name, part in one.parts().items():
        assert part.dtype == other.parts()[name].dtype, name
        assert np.array_equal(part, other.parts()[name]), name


@each_grid
def test_files_give_every_number_back_in_its_type(grid):
    for q in map(storable, read_tensors(grid)):
        tensors = compressed_tensors.to_tensors(q)
        kind = read_layout.scale_type(tensors)
        stated = compressed_tensors.contents(grid, dtype=q.dtype, shape=q.shape, kind=kind)
        assert {name: (array.dtype.name, array.shape) for name, array in tensors.items()} == stated
        assert compressed_tensors.shape_of(tensors, grid) == q.shape
        same(compressed_tensors.from_tensors(tensors, grid=grid, dtype=q.dtype, shape=q.shape), q)


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("int4-g32-affine", "weight_biases", np.inf, "weight_biases holds 1 numbers"),
        ("int4-g32-stored", "weight_scale", np.nan, "weight_scale holds 1 numbers"),
        ("e2m1-g32-stored-e8m0", "weight_scale", 255, "each of which should be an exponent"),
        ("e2m1-g16-stored-nvfp4", "weight_scale", 0x7F, "a finite e4m3"),
        ("e2m1-g16-stored-nvfp4", "weight_global_scale", 0, "finite, and not 0"),
        ("e4m3-row-stored", "weight", np.nan, "a finite e4m3"),
        ("e5m2-row-stored", "weight_packed", -1, "a finite e5m2"),
        ("int4-tensor-stored-zeros", "weight_zero_point", 120, "a code of int4"),
        ("int3-tensor-stored-zeros", "weight_zero_point", -5, "a code of int3"),
    ],
)
def test_damage_is_named(name, part, value, message):
    q = read_tensor(Grid.parse(name), "float32")
    tensors = {key: np.array(array) for key, array in compressed_tensors.to_tensors(q).items()}
    tensors[part][(0,) * tensors[part].ndim] = value
    with pytest.raises(qkit.ArtifactError, match=message):
        compressed_tensors.from_tensors(tensors, grid=q.grid, dtype=q.dtype, shape=q.shape)


def test_a_zero_point_of_more_bits_than_codes_is_refused():
    q = read_tensor(Grid("int4", 32, "stored-zeros"), "float32")
    with pytest.raises(
        qkit.ArtifactError, match="the zero points holds 2 numbers, each of which should be one of 4 bits"
    ):
        compressed_tensors.to_tensors(
            replace(q, zeros=np.where(np.arange(24).reshape(6, 4) < 2, 16, q.zeros % 16).astype(np.uint8))
        )


@pytest.mark.parametrize(("part", "value"), [("", 0), ("weight", 8), ("weight", -100), ("weight_zero_point", 120)])
def test_bytes_that_are_no_codes_of_so_few_bits_are_refused(part, value, tmp_path):
    """As `int-quantized` has codes and zero points. A zero point above 127 would wrap."""

    def encode(weight, random):
        codes, zero = random.integers(-8, 8, weight.shape).astype(np.int8), np.array([-3], np.int8)
        held = {"weight": codes, "weight_scale": np.array([0.01], np.float32), "weight_zero_point": zero}
        if part:
            held[part].flat[-1] = value
        return held

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "tensor"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    rewritten(tmp_path / "m", encode, {**settings, "quantization_status": "compressed", "ignore": ["lm_head"]})
    if not part:
        tensors, found = load_file(tmp_path / "m" / "model.safetensors"), read_model(tmp_path / "m")
        for path, held in found.weights.items():
            codes, scale, zero = (tensors[f"{path}.{name}"] for name in ("weight", "weight_scale", "weight_zero_point"))
            want = (codes.astype(np.float32) - zero) * scale
            assert np.array_equal(reference.dequantize(replace(unpack(held.read()), dtype="float32")), want)
        return
    with pytest.raises(
        qkit.ArtifactError, match=rf"_proj.*{part} holds 1 numbers, each of which should be a code of int4"
    ):
        read_model(tmp_path / "m").digest()


@each_grid
@pytest.mark.parametrize("engine", ["torchao", "mlx"])
def test_a_layer_on_each_is_saved_inspected_verified_and_loaded(grid, engine, tmp_path):
    mine, q = qkit.backend(engine), storable(read_tensor(grid, "float32", "float16"))
    if grid.stored_scales == "e8m0":
        q = replace(q, scales=np.clip(q.scales, 100, 140))  # products of others are infinite
    model = mine.replace(*packed(mine, q))
    qkit.save(model, tmp_path / "one")
    found = inspect_directory(tmp_path / "one").groups[0]
    assert (found.stored.rule.weight, found.format) == (grid, compressed_tensors.layout(grid))
    assert not list(verify(tmp_path / "one"))
    again = qkit.load(tmp_path / "one", into=mine.make_layer("linear", np.zeros(q.shape, np.float32)), backend=engine)
    (layer,) = mine.layers(again)
    same(mine.unpack(layer.module).map(mine.to_numpy), q)
    x = np.random.default_rng(0).standard_normal((3, q.shape[1])).astype(np.float32)
    values = reference.dequantize(q).astype(np.float64)
    made, exact = mine.run_layer(again, x), x @ values.T
    assert np.abs(made - exact).max() <= 1e-6 * (np.abs(x) @ np.abs(values).T).max()
    assert all(row.equal for row in compare(*[read_model(tmp_path / "one")] * 2))


def packed(engine, q):
    model = engine.make_layer("linear", np.zeros(q.shape, np.float32))
    return model, {"": engine.pack(model, q.map(engine.from_numpy), Rule(("*",), weight=q.grid))}


@each_grid
def test_gguf_holds_the_same_values_or_refuses(grid):
    theirs = pytest.importorskip("gguf")
    q = storable(read_tensor(grid, "float32", "float16"))
    if not held_by_gguf(grid):
        with pytest.raises(qkit.ArtifactError, match="GGUF holds no rows"):
            gguf.kind_of(pack(q))
        return
    kind = gguf.kind_of(pack(q))
    with np.errstate(over="ignore"):
        values = theirs.quants.dequantize(gguf.store(pack(q)), theirs.GGMLQuantizationType[kind])
    assert np.array_equal(values, reference.dequantize(q))


def held_by_gguf(grid):
    fits = grid.group in (32, 64, "row", "tensor")
    if grid.scale == "affine":
        return fits and grid.element.bits in (4, 5)
    if grid.scale == "stored-zeros":
        return fits and grid.element.bits < 8
    return fits and (grid.element.kind == "integer" or (grid.element.name, grid.scale) == ("e2m1", "stored-e8m0"))


def test_gguf_refuses_scales_and_biases_that_are_no_float16():
    for part in ("scales", "biases"):
        q = read_tensor(Grid("int4", 32, "affine"), "float32", "float16")
        wide = {name: getattr(q, name).astype(np.float32) for name in ("scales", "biases")}
        wide[part][1, 2] = 0.1
        with pytest.raises(qkit.ArtifactError, match=f"1 of 24 {part} are no float16, which Q4_1 holds"):
            gguf.kind_of(pack(replace(q, **wide)))


def test_a_server_is_stopped_from_a_format_that_only_qkit_opens(tmp_path):
    from models import make

    mlx_lm = pytest.importorskip("mlx_lm")
    from qkit.exchange.import_model import to_artifact

    mlx_lm.convert(str(make(tmp_path / "float", "llama")), str(tmp_path / "mlx"), quantize=True)
    to_artifact(read_model(tmp_path / "mlx"), tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["format"] == read_layout.OWN
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"only qkit opens such codes: use qkit\.load"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert "model.layers.0.mlp.up_proj.weight_biases" in file.keys()  # noqa: SIM118  # safetensors has no iterator
    assert any("only qkit" in text for text in inspect_directory(tmp_path / "out").served)
