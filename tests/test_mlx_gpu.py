"""What differs on a GPU: layers packed from bfloat16 hand it to MLX's kernels as it is. Runs where MLX has a GPU."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="the mlx extra is not installed")
nn = pytest.importorskip("mlx.nn")
if not mx.is_available(mx.gpu):
    pytest.skip("MLX has no GPU here", allow_module_level=True)

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402

BE = qkit.backend("mlx")
DIRECT = [Grid("int4", 64), Grid("int2", 32), Grid("e2m1", 32), Grid("e4m3", 32), Grid("e2m1", 16, "nvfp4")]
EXACT = [Grid("int8", 64), Grid("int4", 64, "minmax")]

each_grid = pytest.mark.parametrize("grid", [*DIRECT, *EXACT], ids=str)


def layer():
    mx.random.seed(0)
    plain = nn.Linear(256, 128)
    plain.set_dtype(mx.bfloat16)
    return plain


def inputs():
    return mx.random.normal((5, 256), key=mx.random.key(1)).astype(mx.bfloat16)


def converted(grid):
    plain = layer()
    return BE.quantize(plain.weight, grid), qkit.convert(plain, Recipe("test", (Rule(("*",), weight=grid),)))


@each_grid
def test_codes_and_scales_are_those_that_went_in(grid):
    q, packed = converted(grid)
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        packed.set_dtype(dtype)
        parts = BE.unpack(packed).parts()
        assert all(np.array_equal(BE.to_numpy(part), BE.to_numpy(parts[name])) for name, part in q.parts().items())


@each_grid
def test_bfloat16_goes_in_and_comes_out(grid):
    q, packed = converted(grid)
    assert packed.direct is (grid in DIRECT)
    w = BE.dequantize(q).astype(mx.float32)
    x = inputs()
    magnitude = mx.abs(x.astype(mx.float32)) @ mx.abs(w).T
    want = x.astype(mx.float32) @ w.T + packed.bias.astype(mx.float32)
    y = packed(x)
    assert y.dtype == mx.bfloat16
    # MLX's kernels decode, multiply and add in bfloat16; elsewhere one rounding, of the result
    assert (mx.abs(y.astype(mx.float32) - want) <= 1.1e-2 * magnitude).all()


@each_grid
def test_prepared_equals_converted(grid):
    model = qkit.prepare(layer(), Recipe("test", (Rule(("*",), weight=grid),)))
    model.eval()
    want = BE.to_numpy(model(inputs()))
    assert np.array_equal(BE.to_numpy(qkit.convert(model)(inputs())), want)


@each_grid
def test_a_layer_that_goes_to_the_cpu_computes_in_float32(grid):
    q, packed = converted(grid)
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        there = BE.pack(layer(), q.map(BE.to_numpy), Rule(("*",), weight=grid))
        assert not there.direct
        assert np.array_equal(BE.to_numpy(packed(inputs())), BE.to_numpy(there(inputs())))
    finally:
        mx.set_default_device(before)
