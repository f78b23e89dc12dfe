"""Exports in one pass over mapped codes: the bytes of the layouts' own `store`, for every weight that takes that way."""

import numpy as np
import pytest

import qkit
from qkit import native
from qkit.formats import compressed_tensors, gguf, mlx_lm
from qkit.formats.mapped import gguf_blocks, gguf_kind, mapped, mlx_tensors
from qkit.formats.packed import pack

pytestmark = pytest.mark.skipif(not native.available(), reason="kernels.c was not compiled here")
SHAPES = {32: (6, 96), 64: (5, 192), 128: (3, 4096), "row": (7, 70_016)}  # rows longer than the memory of scales, too


def stored(bits, group, dtype="bfloat16", scale="absmax", change=None):
    """The stored tensors of a weight, its grid and its shape."""
    import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16

    shape = SHAPES[group]
    w = (np.random.default_rng(bits).standard_normal(shape) * 0.05).astype(np.float32)
    q = qkit.quantize(w.astype(dtype), qkit.Grid(f"int{bits}", group, scale))
    parts = compressed_tensors.store(pack(q), form=compressed_tensors.layout(q.grid))
    parts = {name: np.ascontiguousarray(array) for name, array in parts.items()}
    if change is not None:
        parts["weight_scale"] = change(parts["weight_scale"].copy())
    return parts, {"grid": q.grid, "dtype": dtype, "shape": shape}


@pytest.mark.parametrize("group", SHAPES)
@pytest.mark.parametrize("scale", ["absmax", "signed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_tensors_for_mlx_are_those_of_its_layout(bits, scale, group):
    parts, about = stored(bits, group, scale=scale)
    plain = mapped(parts, **about)
    got = mlx_tensors(plain)
    want = mlx_lm.store(compressed_tensors.restore(parts, **about))
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()
    assert (got["scales"] is parts["weight_scale"]) == (bits <= 4 and group != "row")


@pytest.mark.parametrize("group", SHAPES)
@pytest.mark.parametrize("scale", ["absmax", "signed"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_for_gguf_are_those_of_its_layout(bits, scale, group, turned, monkeypatch):
    monkeypatch.setattr("qkit.formats.mapped.BYTES", 4096)  # several times
    parts, about = stored(bits, group, scale=scale)
    plain, packed = mapped(parts, **about), compressed_tensors.restore(parts, **about)
    order = np.arange(about["shape"][0])[::-1].copy() if turned else None
    assert gguf_kind(plain) == gguf.kind_of(packed)
    want = gguf.store(packed if order is None else packed.permuted(order))
    got = np.concatenate([block.copy() for block in gguf_blocks(plain, order)])
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_codes_that_gguf_widens_are_not_moved(bits):
    parts, about = stored(bits, 64)
    assert gguf_kind(mapped(parts, **about)) is None


@pytest.mark.parametrize("number", [0.0, -0.0, np.inf, -np.inf, np.nan])
def test_scales_that_are_not_sound_take_the_way_that_names_them(number):
    def change(scales):
        scales[0, 0] = number
        return scales

    parts, about = stored(4, 64, change=change)
    assert mapped(parts, **about) is None
    with pytest.raises(qkit.ArtifactError, match="weight_scale"):
        compressed_tensors.restore(parts, **about)


@pytest.mark.parametrize("number", [2.0**-24, 1e-30, 1e-39, 70000.0, 2.0**120])
def test_scales_that_are_no_float16_are_computed_for_gguf_and_exact_for_mlx(number):
    def change(scales):
        scales[1, 1] = number
        return scales

    parts, about = stored(4, 64, change=change)
    plain = mapped(parts, **about)
    assert gguf_kind(plain) is None
    want = mlx_lm.store(compressed_tensors.restore(parts, **about))
    assert {name: array.tobytes() for name, array in mlx_tensors(plain).items()} == {
        name: np.ascontiguousarray(array).tobytes() for name, array in want.items()
    }


def test_other_tensors_types_and_shapes_take_the_other_way():
    parts, about = stored(4, 64)
    assert mapped(parts, **about) is not None
    assert mapped(None, **about) is None
    assert mapped({**parts, "weight_zero_point": parts["weight_shape"]}, **about) is None
    assert mapped({**parts, "weight_scale": parts["weight_scale"].astype(np.float32)}, **about) is None
    assert mapped({**parts, "weight_scale": parts["weight_scale"][:, ::2]}, **about) is None
    assert mapped({**parts, "weight_packed": parts["weight_packed"][:-1]}, **about) is None
    assert mapped({**parts, "weight_shape": parts["weight_shape"] + 1}, **about) is None
    parts, about = stored(4, 64, scale="minmax")
    assert mapped(parts, **about) is None


def test_blocks_that_do_not_fit_are_refused():
    words, scales = np.zeros((2, 8), np.uint32), np.ones((2, 2), "bfloat16")
    with pytest.raises(ValueError, match="4 blocks of 4 bits: not 64 bytes of codes in 71"):
        native.scaled_blocks(words, scales, repeat=1, bits=4, out=np.empty(71, np.uint8))
