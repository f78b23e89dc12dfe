"""An element and a scale rule that MLX has never heard of: right, or refused by name. And who may import which room."""

import ast
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")

import qkit_mlx  # noqa: E402
from qkit_mlx.kernels import choose, cpu, cuda_source  # noqa: E402
from qkit_mlx.layers import converted, execution  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule, native, reference  # noqa: E402
from qkit.element import STEP, Element, reciprocal  # noqa: E402
from qkit.formats.mlx_lm import containers_for  # noqa: E402
from qkit.reference import packing as law_packing  # noqa: E402
from qkit.reference import rounding as law  # noqa: E402
from qkit.testing import random  # noqa: E402

BE = qkit.backend("mlx")
INT7 = Element("int7", "integer", 7, 63)
INT7_GRIDS = [(32, "signed"), (64, "absmax"), ("row", "midmax"), (32, "minmax"), ("tensor", "absmax")]
W = random((96, 128), 0)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """No array is too small for the C kernels."""
    monkeypatch.setattr(cpu, "FEWEST", 1)


@pytest.fixture
def int7(monkeypatch):
    steps = {
        "signed": 1 / INT7.lowest,
        "absmax": reciprocal(63.0),
        "midmax": reciprocal(63.5),
        "minmax": reciprocal(127.0),
    }
    for rule, step in steps.items():
        monkeypatch.setitem(STEP, ("int7", rule), step)


@pytest.fixture
def rms(monkeypatch):
    """A grid whose scale rule is new: four times the root of the mean square is the highest code."""
    known = law.symmetric_scale

    def symmetric_scale(x, grid):
        if grid.scale != "rms":
            return known(x, grid)
        peak = 4 * np.sqrt((x * x).mean(axis=-1))
        return (peak / grid.element.highest).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)

    monkeypatch.setattr(
        law, "symmetric_scale", lambda x, grid: np.ascontiguousarray(symmetric_scale(x, grid)).view(np.float32)
    )
    grid = object.__new__(Grid)
    for name, value in {"element": Grid("int4", 32).element, "group": 32, "scale": "rms"}.items():
        object.__setattr__(grid, name, value)
    return grid


def assert_same(q, want):
    assert q.parts().keys() == want.parts().keys()
    for name, part in want.parts().items():
        assert BE.to_numpy(q.parts()[name]).tobytes() == part.tobytes(), name


def float_layer():
    layer = nn.Linear(128, 96, bias=False)
    layer.weight = BE.from_numpy(W)
    return layer


def prepare(grid):
    return qkit.prepare(float_layer(), Recipe("test", (Rule(("*",), weight=grid),)))


@pytest.mark.parametrize(("group", "scale"), INT7_GRIDS)
def test_a_new_element_has_the_codes_and_values_of_the_law(int7, group, scale):
    grid = Grid(INT7, group, scale)
    w, want = BE.from_numpy(W), reference.fake_quantize(W, grid)
    assert_same(BE.quantize(w, grid), reference.quantize(W, grid))
    assert np.array_equal(BE.to_numpy(BE.dequantize(BE.quantize(w, grid))), want)
    for run in (lambda f: f, mx.compile):
        assert np.array_equal(BE.to_numpy(run(lambda x: BE.fake_quantize(x, grid))(w)), want)
    assert np.array_equal(BE.to_numpy(choose.fake_quantize_weight(w, grid)), want)
    assert not cpu.takes(w, grid)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_codes_of_a_new_element_are_packed_as_the_law_packs_them(dtype):
    codes = np.random.default_rng(0).integers(-64 if dtype is np.int8 else 0, 64, (5, 96)).astype(dtype)
    want = law_packing.pack(law_packing.unsigned(codes, INT7), 7)
    assert BE.to_numpy(choose.packed_codes(BE.from_numpy(codes), INT7)).tobytes() == want.tobytes()


@pytest.mark.parametrize(("group", "scale"), INT7_GRIDS)
def test_a_layer_on_a_new_element_is_decoded_first(int7, group, scale):
    grid = Grid(INT7, group, scale)
    model, x = prepare(grid), mx.eye(128)
    assert np.array_equal(BE.to_numpy(model(x)).T, reference.fake_quantize(W, grid))
    want = BE.to_numpy(model.eval()(x))
    model = qkit.convert(model)
    assert type(model).__name__ == "PlainLinear"
    assert_same(BE.unpack(model), reference.quantize(W, grid))
    assert np.array_equal(BE.to_numpy(model(x)), want)
    assert qkit.coverage(model).rows[0].state == f"decoded first: MLX has no container for {grid}"


def test_a_new_scale_rule_is_computed_by_the_law(rms):
    w, want = BE.from_numpy(W), reference.fake_quantize(W, rms)
    assert_same(BE.quantize(w, rms), reference.quantize(W, rms))
    assert np.array_equal(BE.to_numpy(BE.fake_quantize(w, rms)), want)
    assert np.array_equal(BE.to_numpy(BE.unclipped(w, rms)), reference.unclipped(W, rms))
    model, x = prepare(rms), mx.eye(128)
    assert np.array_equal(BE.to_numpy(model(x)).T, want)
    model = qkit.convert(model)
    assert_same(BE.unpack(model), reference.quantize(W, rms))
    assert np.array_equal(BE.to_numpy(model(x)).T, want)


def test_a_new_scale_rule_is_refused_by_name_in_compiled_functions(rms):
    with pytest.raises(qkit.BackendError, match="does not compile rms scales of int4-g32-rms"):
        mx.compile(lambda x: BE.fake_quantize(x, rms))(BE.from_numpy(W))


def test_kernels_declare_their_elements_and_rules(int7, rms):
    w = BE.from_numpy(W)
    assert cpu.takes(w, Grid("int4", 32)) is native.available()
    assert not cpu.takes(w, rms)
    assert cuda_source.declares(Grid("int4", 32))
    assert cuda_source.declares(Grid(INT7, 32, "signed"))  # the source computes any width up to 8
    assert not cuda_source.declares(rms)
    assert not cuda_source.declares(Grid(Element("e3m2", "float", 6, 28.0, mantissa=2, min_exponent=-2), 32, "floor"))
    assert not containers_for(Grid(INT7, 32, "signed"), 128)


def test_nvfp4_without_a_kernel_keeps_the_scale_of_its_tensor(monkeypatch):
    grid = Grid("e2m1", 16, "nvfp4")
    w = W * 2.0**20
    monkeypatch.setattr(execution, "why_no_kernel", lambda *_, **__: "there is no kernel")
    q, want = BE.quantize(BE.from_numpy(w), grid), reference.fake_quantize(w, grid)
    layer = converted.pack_linear(q, Rule(("*",), weight=grid))
    assert (layer.execution.native, layer.execution.text) == (False, "there is no kernel")
    assert_same(BE.unpack(layer), reference.quantize(w, grid))
    assert np.array_equal(BE.to_numpy(layer(mx.eye(128))).T, want)
    table = converted.pack_embedding(q, Rule(("*",), kind="embedding", weight=grid))
    assert np.array_equal(BE.to_numpy(table(mx.array([3, 95]))), want[[3, 95]])


# Rooms

FOLDER = Path(qkit_mlx.__file__).parent


def imported(path):
    """Every module of the engine that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qkit_mlx"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_choose_imports_kernels():
    for path in FOLDER.rglob("*.py"):
        kernels = {name for name in imported(path) if name.startswith("qkit_mlx.kernels.")}
        if path.parent.name != "kernels":
            assert not kernels - {"qkit_mlx.kernels.choose", *(n for n in kernels if ".choose." in n)}, path


def test_arithmetic_is_arrays_only():
    for path in (FOLDER / "arithmetic").glob("*.py"):
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("qkit_mlx.")}
        assert rooms <= {"arithmetic"}, path
        assert "mlx.nn" not in imported(path), path


def test_the_arithmetic_has_the_functions_of_the_law_in_its_order():
    """A few of the law's functions are elsewhere or not needed; the engine's own stand between."""
    rooms = Path(reference.__file__).parent
    for name in ("rounding", "packing", "merged", "learned", "ranges"):
        mine, laws = (
            [
                node.name
                for node in ast.parse((folder / f"{name}.py").read_text()).body
                if isinstance(node, ast.FunctionDef)
            ]
            for folder in (FOLDER / "arithmetic", rooms)
        )
        common = [function for function in laws if function in mine]
        assert common, name
        assert [function for function in mine if function in common] == common, name
