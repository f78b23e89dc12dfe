"""What differs on a GPU: layers packed from bfloat16 hand it to MLX's kernels as it is, and CUDA's kernels that fake-quantize
in one pass. Runs where MLX has a GPU.
"""

from functools import partial

import models
import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")
if not mx.is_available(mx.gpu):
    pytest.skip("MLX has no GPU here", allow_module_level=True)

from qkit_mlx.kernels import cuda  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule, reference  # noqa: E402
from qkit.qtensor import DTYPES  # noqa: E402
from qkit.testing import all_grids, random, tensors  # noqa: E402

BE = qkit.backend("mlx")
inputs = partial(models.inputs, "mlx", width=256, dtype="bfloat16")
DIRECT = [Grid("int4", 64), Grid("int2", 32), Grid("e2m1", 32), Grid("e4m3", 32), Grid("e2m1", 16, "nvfp4")]
EXACT = [Grid("int8", 64), Grid("int4", 64, "minmax")]

each_grid = pytest.mark.parametrize("grid", [*DIRECT, *EXACT], ids=str)


def layer():
    mx.random.seed(0)
    plain = nn.Linear(256, 128)
    plain.set_dtype(mx.bfloat16)
    return plain


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
    assert packed.execution.in_bfloat16 is (grid in DIRECT)
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
        assert not there.execution.in_bfloat16
        assert np.array_equal(BE.to_numpy(packed(inputs())), BE.to_numpy(there(inputs())))
    finally:
        mx.set_default_device(before)


on_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="there are kernels for CUDA only")
FUSED = [
    *(grid for grid in all_grids() if grid.group != "tensor"),
    Grid("int8", 172),
    Grid("int4", 16),
    Grid("int4", 1),
]
SHORT = [
    Grid("int4", 64),
    Grid("int4", 64, "minmax"),
    Grid("int8", "row"),
    Grid("e4m3", "row"),
    Grid("e2m1", 16, "nvfp4"),
]
CUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: mx.contiguous(x.T).T,
    "rows left out": lambda x: x[1::2],
    "not at the start of its memory": lambda x: mx.concatenate([mx.zeros(3, x.dtype), x.reshape(-1)])[3:].reshape(
        x.shape
    ),
}


def agree(x, grid, run):
    """Whether the kernel on `x` (NumPy) gives the reference's values, NaN for NaN."""
    got = BE.to_numpy(run(BE.from_numpy(x)))
    with np.errstate(all="ignore"):
        want = reference.fake_quantize(x, grid)
    return np.array_equal(got.astype(np.float32), want.astype(np.float32), equal_nan=True)


def width(grid):
    return 172 * 4 if grid.group == 172 else 640


def runs(grid):
    """The kernel, alone and in a compiled function with something to fuse around it."""

    def kernel(x):
        assert cuda.takes(x, grid)
        return cuda.fake_quantize(x, grid)

    return {"eager": kernel, "compiled": mx.compile(lambda x: kernel(x * 1.0) * 1.0)}


@on_cuda
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", FUSED, ids=str)
def test_one_pass_gives_the_values_of_the_reference(grid, dtype, mode):
    run = runs(grid)[mode]
    named = {} if grid.group == 1 else tensors(grid, dtype)
    given = {**named, "random": random((64, width(grid)), 1, dtype), "one": random((1, width(grid)), 2, dtype)}
    assert not [name for name, x in given.items() if not agree(x, grid, run)]


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", SHORT, ids=str)
def test_rows_of_every_length(grid, dtype):
    run = runs(grid)["eager"]
    lengths = [16, 48, 172, 768, 1000, 1024, 4096, 14336, 40000] if grid.group == "row" else [64, 192, 4096]
    assert not [length for length in lengths if not agree(random((3, length), length, dtype), grid, run)]


@on_cuda
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", SHORT, ids=str)
def test_arrays_that_lie_otherwise_in_memory(grid, dtype, cut):
    run = runs(grid)["eager"]
    x = BE.to_numpy(CUTS[cut](BE.from_numpy(random((64, 128), 5, dtype))))
    assert agree(x, grid, lambda _: run(CUTS[cut](BE.from_numpy(random((64, 128), 5, dtype)))))


@on_cuda
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", FUSED, ids=str)
def test_a_group_that_holds_no_number_gives_none(grid, bad):
    x = random((4, width(grid)), 3)
    x[2, 5] = bad
    assert agree(x, grid, runs(grid)["eager"])


@on_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["int4-g64", "mxfp4", "int8-dynamic-act-int4-weight", "nvfp4"])
def test_gradients_go_straight_through_the_kernel(name, compiled):
    model = qkit.prepare(nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 64)), name)
    x = mx.random.normal((8, 256), key=mx.random.key(1))
    gradient = nn.value_and_grad(model, lambda x: model(x).sum())
    run = mx.compile(gradient, inputs=[model.state], outputs=[model.state]) if compiled else gradient
    for _ in range(2):
        slopes = run(x)[1]["layers"][1]
        assert mx.array_equal(slopes["bias"], mx.full(64, 8.0))
        assert mx.abs(slopes["weight"]).max() > 0
        assert mx.array_equal(slopes["weight"][0], slopes["weight"][1])
