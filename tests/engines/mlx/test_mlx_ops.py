"""Given scales and clipped gradients on MLX: the reference, bit for bit, on every grid, eager and compiled."""

from functools import partial

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import qkit  # noqa: E402
from qkit import Grid, reference  # noqa: E402
from qkit.qtensor import DTYPES  # noqa: E402
from qkit.testing.hard_tensors import all_grids, random, tensors  # noqa: E402

BE = qkit.backend("mlx")
GRIDS = all_grids()
STATIC = [grid for grid in GRIDS if grid.group == "tensor"]
COMPILED = [grid for grid in GRIDS if grid.group in (16, 32)]
NAN, INF = float("nan"), float("inf")

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def same(one, other):
    """IEEE ==, NaN where NaN."""
    return np.array_equal(np.float32(one), np.float32(other), equal_nan=True)


def static(x, grid):
    """Steps and zero points that fit half of what is in `x`, so that some of it is clipped."""
    q = reference.quantize(np.float32(x) / 2, grid)
    return reference.scale_values(q), q.zeros


def given(arrays):
    return {name: None if array is None else BE.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unclipped_equals_the_reference(grid):
    for name, w in tensors(grid).items():
        found = BE.to_numpy(BE.unclipped(BE.from_numpy(w), grid))
        assert np.array_equal(found, reference.unclipped(w, grid)), name


@pytest.mark.parametrize("grid", COMPILED, ids=str)
def test_unclipped_equals_the_reference_when_compiled(grid):
    compiled = mx.compile(partial(BE.unclipped, grid=grid))
    for name, w in tensors(grid, "bfloat16").items():
        assert np.array_equal(BE.to_numpy(compiled(BE.from_numpy(w))), reference.unclipped(w, grid)), name


@pytest.mark.parametrize(("compiled", "dtype"), [(False, "float32"), (True, "bfloat16")], ids=["eager", "compiled"])
@pytest.mark.parametrize("grid", STATIC, ids=str)
def test_given_scales_equal_the_reference(grid, compiled, dtype):
    rounded = partial(BE.fake_quantize, grid=grid)
    inside = partial(BE.unclipped, grid=grid)
    if compiled:
        rounded, inside = (mx.compile(f) for f in (rounded, inside))
    for name, w in tensors(grid, dtype).items():
        scales, zeros = static(w, grid)
        here = given({"scales": scales, "zeros": zeros})
        want = reference.fake_quantize(w, grid, scales=scales, zeros=zeros)
        found = BE.to_numpy(rounded(BE.from_numpy(w), **here))
        assert found.dtype == want.dtype, name
        assert same(found, want), name
        want = reference.unclipped(w, grid, scales=scales, zeros=zeros)
        assert np.array_equal(BE.to_numpy(inside(BE.from_numpy(w), **here)), want), name


@pytest.mark.parametrize("grid", STATIC, ids=str)
def test_nan_spoils_itself_only_under_given_scales(grid):
    x = random((4, 64), 1)
    scales, zeros = static(x, grid)
    x[1, 2], x[2, 3], x[3, 4] = NAN, INF, -INF
    found = BE.to_numpy(BE.fake_quantize(BE.from_numpy(x), grid, **given({"scales": scales, "zeros": zeros})))
    assert np.array_equal(np.isnan(found), ~np.isfinite(x))
    assert same(found, reference.fake_quantize(x, grid, scales=scales, zeros=zeros))


@pytest.mark.parametrize("ste", ["identity", "masked"])
@pytest.mark.parametrize(
    ("grid", "static_scales"), [*((grid, True) for grid in STATIC), *((grid, False) for grid in COMPILED)], ids=str
)
def test_the_gradient_passes_where_the_straight_through_estimator_says(grid, static_scales, ste):
    w = np.float32(random((4, 128), 6))
    scales, zeros = static(w, grid) if static_scales else (None, None)
    here = given({"scales": scales, "zeros": zeros})
    slope = random((4, 128), 7)
    mask = reference.unclipped(w, grid, scales=scales, zeros=zeros)
    want = slope * mask if ste == "masked" else slope

    def loss(w):
        return (BE.fake_quantize(w, grid, ste=ste, **here) * BE.from_numpy(slope)).sum()

    assert not static_scales or not mask.all()  # half the range: something is clipped
    for gradient in (mx.grad(loss), mx.compile(mx.grad(loss))):
        assert same(BE.to_numpy(gradient(BE.from_numpy(w))), want)
    tangent = mx.jvp(lambda w: BE.fake_quantize(w, grid, ste=ste, **here), [BE.from_numpy(w)], [BE.from_numpy(slope)])
    assert same(BE.to_numpy(tangent[1][0]), want)


@each_dtype
def test_a_masked_gradient_keeps_its_type(dtype):
    w = BE.from_numpy(random((4, 128), 6, dtype))
    made = mx.grad(lambda w: BE.fake_quantize(w, Grid("int4", 32), ste="masked").sum())(w)
    assert made.dtype == w.dtype
    assert 0 < made.sum() < made.size  # `signed` clips what is as large as the scale's own element, on the other side


def test_scales_get_no_gradient():
    grid = Grid("int8", "tensor")
    x = BE.from_numpy(random((4, 64), 1))

    def loss(s):
        return BE.fake_quantize(x, grid, scales=s).sum()

    assert not BE.to_numpy(mx.grad(loss)(mx.array([[0.03125]]))).any()


@each_dtype
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_layer_is_made_around_a_weight(kind, dtype):
    weight = random((96, 64), 2, dtype)
    layer = BE.make_layer(kind, weight)
    assert type(layer).__name__.lower() == kind
    assert list(BE.tensors(layer)) == ["weight"]
    held = BE.to_numpy(BE.weight(layer))
    assert held.dtype == weight.dtype
    assert np.array_equal(held, weight)
