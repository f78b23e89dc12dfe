"""qkit's C kernels on MLX's CPU arrays: the bits of MLX's operations, which do the work where the kernels cannot."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")

from qkit_mlx.arithmetic import packing, rounding  # noqa: E402
from qkit_mlx.arithmetic.small_floats import ceil_scale  # noqa: E402
from qkit_mlx.kernels import choose, cpu  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule, reference  # noqa: E402
from qkit.element import INTEGERS  # noqa: E402
from qkit.errors import DTypeError, GridError, RangeError  # noqa: E402
from qkit.native import library  # noqa: E402
from qkit.qtensor import DTYPES  # noqa: E402
from qkit.reference import packing as law  # noqa: E402
from qkit.reference import rounding as law_rounding  # noqa: E402
from qkit.testing.hard_tensors import all_grids, random, tensors  # noqa: E402

BE = qkit.backend("mlx")
GRIDS = all_grids()
FEW = [
    Grid("int4", 64),
    Grid("int3", 32, "minmax"),
    Grid("int8", "row"),
    Grid("e2m1", 32),
    Grid("e2m1", 16, "nvfp4"),
    Grid("e4m3", "tensor"),
]
INT4 = Grid("int4", 32)

pytestmark = pytest.mark.skipif(not library.available(), reason="qkit was built without a C compiler")


@pytest.fixture(params=["kernels", "operations"])
def way(request, monkeypatch):
    """Both ways, of which every array is large enough for the kernels in the one, and they were not built in the other."""
    monkeypatch.setattr(cpu, "FEWEST", 1)
    if request.param == "operations":
        monkeypatch.setattr(library, "_library", lambda: None)
    return request.param


@pytest.fixture
def taken(monkeypatch):
    """Whether each array was taken, in order; none is too small."""
    answers, evaluate = [], cpu.evaluate

    def spy(x):
        answers.append(evaluate(x))
        return answers[-1]

    monkeypatch.setattr(cpu, "FEWEST", 1)
    monkeypatch.setattr(cpu, "evaluate", spy)
    return answers


def assert_same(made, want):
    assert made.parts().keys() == want.parts().keys()
    assert (made.grid, made.dtype) == (want.grid, want.dtype)
    for part, array in want.parts().items():
        one = BE.to_numpy(made.parts()[part])
        assert (one.dtype, one.shape) == (array.dtype, array.shape), part
        assert one.tobytes() == array.tobytes(), part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_both_ways_are_the_reference(grid, dtype, way):
    for w in list(tensors(grid, dtype).values())[:: 1 if way == "kernels" else 5]:
        x, q = BE.from_numpy(w), reference.quantize(w, grid)
        assert_same(BE.quantize(x, grid), q)
        words = choose.packed_codes(BE.from_numpy(q.codes), grid.element)
        assert BE.to_numpy(words).tobytes() == law.packed_codes(q).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", FEW, ids=str)
def test_a_layer_multiplies_with_the_reference_either_way(grid, dtype, way):
    w = random((8, 192), 0, dtype)
    model = nn.Linear(192, 8, bias=False)
    model.weight = BE.from_numpy(w)
    model = qkit.prepare(model, Recipe("test", (Rule(("*",), weight=grid),)))
    w_hat = model(mx.eye(192).astype(model.weight.dtype)).T
    assert (BE.to_numpy(w_hat).astype(np.float32) == reference.fake_quantize(w, grid).astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(64,), (3, 2, 64), (5, 192)])
def test_any_rank_and_any_strides(shape, way):
    wide = random((*shape, 2), 0)
    for x, w in ((BE.from_numpy(wide)[..., 0], wide[..., 0]), (BE.from_numpy(wide[..., 1].T.copy()).T, wide[..., 1])):
        for grid in FEW:
            assert_same(BE.quantize(x, grid), reference.quantize(w, grid))
            assert BE.magnitude(x) == np.abs(w).max()


@pytest.mark.parametrize("element", INTEGERS, ids=str)
def test_codes_are_packed_alike(element, way):
    bits = element.bits
    for n in (1, 31, 67):
        codes = np.random.default_rng(n).integers(element.lowest, element.highest + 1, (2, n, 3), dtype=np.int8)
        x = BE.from_numpy(codes).transpose(0, 2, 1)
        want = law.pack(law.unsigned(codes.transpose(0, 2, 1), element), bits)
        assert BE.to_numpy(choose.packed_codes(x, element)).tobytes() == want.tobytes()
        assert BE.to_numpy(choose.packed_codes(packing.unsigned(x, element), element)).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen(bad, dtype, way):
    w = random((4, 64), 0, dtype)
    w[2, 5] = bad
    with pytest.raises(RangeError, match=r"NaN|inf"):
        qkit.quantize(BE.from_numpy(w), INT4)
    rounded, want = BE.to_numpy(choose.fake_quantize_weight(BE.from_numpy(w), INT4)), reference.fake_quantize(w, INT4)
    assert np.array_equal(rounded.astype(np.float32), want.astype(np.float32), equal_nan=True)


def test_what_has_no_codes_is_refused_either_way(way):
    for shape in ((0,), (3, 0), (2, 33)):
        with pytest.raises(GridError):
            qkit.quantize(mx.zeros(shape), INT4)
    with pytest.raises(DTypeError):
        qkit.quantize(mx.zeros((2, 32), mx.int32), INT4)
    with pytest.raises(DTypeError):
        BE.quantize(mx.zeros((2, 32), mx.int32), INT4)


def test_few_numbers_are_left_to_operations_and_many_are_not():
    assert not cpu.reads(mx.zeros(cpu.FEWEST - 1))
    assert cpu.reads(mx.zeros(cpu.FEWEST))


def test_an_array_that_waits_is_evaluated(taken):
    w = random((4, 64), 0)
    assert_same(BE.quantize(BE.from_numpy(w) * 2, INT4), reference.quantize(w * 2, INT4))
    assert taken == [True]


@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_what_is_traced_is_left_to_operations(transform, taken):
    w = random((3, 4, 64), 0)

    def codes(x):
        return choose.packed_codes(BE.quantize(x, INT4).codes, INT4.element)

    assert (
        BE.to_numpy(transform(codes)(BE.from_numpy(w))).tobytes()
        == law.packed_codes(reference.quantize(w, INT4)).tobytes()
    )
    assert taken
    assert not any(taken)


def test_another_device_is_left_to_operations(monkeypatch):
    monkeypatch.setattr(cpu, "CPU", mx.Device(mx.gpu, 0))  # as if the CPU were the other one
    assert not cpu.reads(mx.zeros(cpu.FEWEST))


def test_weights_have_gradients_and_the_kernels_take_them(taken):
    model = nn.Linear(64, 4, bias=False)
    prepared = qkit.prepare(nn.Linear(64, 4, bias=False), Recipe("test", (Rule(("*",), weight=INT4, activation=INT4),)))
    x = BE.from_numpy(random((5, 64), 1))
    model.weight = BE.fake_quantize(prepared.weight, INT4)
    x_hat = BE.fake_quantize(x, INT4)
    taken.clear()
    _, slopes = nn.value_and_grad(prepared, lambda x: (prepared(x) ** 2).sum())(x)
    assert taken == [True]  # and not the input, to wait for which would keep what it was made of
    _, want = nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())(x_hat)
    assert mx.array_equal(slopes["weight"], want["weight"])


def test_a_weight_is_not_written(taken):
    w = random((4, 64), 0)
    x = BE.from_numpy(w)
    made = cpu.fake_quantize(x, INT4)
    made[0] = 7
    assert (BE.to_numpy(x) == w).all()


@pytest.mark.parametrize("element", ["e2m1", "e4m3", "e5m2"])
def test_the_ceiling_of_every_number_is_the_rules(element):
    """All fractions there are, and all exponents."""
    grid = Grid(element, 32)
    for patterns in (np.arange(127 << 23, 129 << 23), np.arange(0, 255 << 23, (1 << 16) - 1)):
        peak = BE.from_numpy(patterns.astype(np.int32)).view(mx.float32)
        want = rounding.power(mx.array(law_rounding.scale_code(BE.to_numpy(peak), grid)))
        assert mx.array_equal(ceil_scale(peak, grid.element), want)
    beyond = mx.array([float("inf"), float("nan"), -float("nan")])
    assert mx.isinf(ceil_scale(beyond, grid.element)).all()
