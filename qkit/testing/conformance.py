"""The laws that a backend obeys: a plugin's author subclasses `Conformance`, names it, and runs pytest."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from qkit import reference
from qkit.element import FLOATS, INTEGERS
from qkit.engines.abilities import offers, require
from qkit.engines.protocol import Arrays, Modules
from qkit.engines.registry import backend as choose
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.reference import rounding
from qkit.rules import CHOICES, Ste
from qkit.testing.activations import Activations
from qkit.testing.hard_tensors import all_grids, coupled, random, tensors
from qkit.testing.kinds import Kinds
from qkit.testing.parity import compare, compare_many, static_parts
from qkit.testing.read_laws import ReadGrids

GRIDS = all_grids()
FAMILIES = {
    element.name: [grid for grid in GRIDS if grid.element == element and grid.group in (16, group)]
    for group, elements in ((64, INTEGERS), (32, FLOATS))
    for element in elements
}
BITS = {2: np.uint16, 4: np.uint32}

each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


class ArrayConformance(ReadGrids):
    """The laws of an engine that works on arrays only, each on every grid. A subclass names the engine in `backend`."""

    backend: ClassVar[str]

    @property
    def engine(self) -> Arrays:
        """The backend under test."""
        return choose(self.backend)

    def test_an_engine_with_modules_takes_the_whole_suite(self) -> None:
        assert isinstance(self, Conformance) or not offers(self.engine, Modules)

    @each_dtype
    @each_grid
    def test_codes_scales_and_values_equal_the_reference(self, grid: Grid, dtype: DType) -> None:
        """On adversarial and on random tensors; values both of `dequantize` and of `fake_quantize`."""
        parity = compare(self.engine, grid, dtype=dtype, compiled=False, size=4096)
        assert parity.exact, parity

    @pytest.mark.parametrize("family", FAMILIES)
    def test_compiled_equals_the_reference(self, family: str) -> None:
        """In bfloat16, where compilers go wrong, at one group size; `qkit parity --all` does the rest."""
        for parity in compare_many(self.engine, FAMILIES[family], dtype="bfloat16", compiled=True, size=4096):
            assert parity.exact, parity

    @each_grid
    def test_fake_quantize_is_dequantize_of_quantize(self, grid: Grid) -> None:
        engine = self.engine
        w = engine.from_numpy(random((4, 256), 1, "bfloat16"))
        values = engine.to_numpy(engine.dequantize(engine.quantize(w, grid)))
        assert (engine.to_numpy(engine.fake_quantize(w, grid)) == values).all()

    @each_grid
    def test_a_group_does_not_see_its_neighbours(self, grid: Grid) -> None:
        if coupled(grid):
            return  # its scale looks at the whole tensor: that is what the grid means
        engine, w = self.engine, random((4, 256), 2)
        changed = w.copy()
        changed[1] *= -1000
        before, after = (engine.quantize(engine.from_numpy(x), grid) for x in (w, changed))
        for name, part in before.parts().items():
            others = np.delete(engine.to_numpy(part), 1, axis=0)
            assert (others == np.delete(engine.to_numpy(after.parts()[name]), 1, axis=0)).all(), name

    @each_grid
    def test_shapes_of_any_rank_are_kept(self, grid: Grid) -> None:
        engine = self.engine
        for shape in ((128,), (2, 3, 128)):
            w = random(shape, 3)
            want = reference.quantize(w, grid)
            q = engine.quantize(engine.from_numpy(w), grid)
            assert q.dtype == "float32"
            for name, part in want.parts().items():
                assert np.array_equal(engine.to_numpy(q.parts()[name]), part), (shape, name)
            assert engine.to_numpy(engine.dequantize(q)).shape == shape

    @pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800000], ids=hex)
    @each_grid
    def test_nan_poisons_exactly_its_group(self, grid: Grid, pattern: int) -> None:
        """Or the whole tensor, where the scale belongs to the tensor; never silently a number. Nor does an infinity."""
        engine, w = self.engine, random((4, 256), 4)
        w.view(np.uint32)[2, 130] = pattern
        values = engine.to_numpy(engine.fake_quantize(engine.from_numpy(w), grid))
        want = np.ones(w.shape, bool) if coupled(grid) else _same_group(w.shape, (2, 130), grid)
        assert np.array_equal(np.isnan(values), want)
        rest = reference.fake_quantize(w, grid)
        assert (values[~want] == rest[~want]).all()

    @each_dtype
    def test_the_bridge_keeps_bits(self, dtype: DType) -> None:
        engine = self.engine
        hard = tensors(Grid("int8", 32), dtype).values()
        x = np.concatenate([*hard, np.full((1, 64), -0.0, rounding.DTYPE[dtype])])
        back = engine.to_numpy(engine.from_numpy(x))
        assert back.dtype == x.dtype
        unsigned = BITS[x.itemsize]
        assert np.array_equal(back.view(unsigned), x.view(unsigned))

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "float32"])
    def test_the_bridge_keeps_codes(self, dtype: str) -> None:
        engine = self.engine
        for x in (np.arange(-96, 96).reshape(3, 64).astype(dtype), np.array(8).astype(dtype)):
            back = engine.to_numpy(engine.from_numpy(x))
            assert back.dtype == x.dtype
            assert np.array_equal(back, x)

    @each_dtype
    def test_magnitude_is_the_largest(self, dtype: DType) -> None:
        engine, w = self.engine, random((4, 64), 5, dtype)
        assert engine.magnitude(engine.from_numpy(w)) == float(np.abs(w.astype(np.float32)).max())

    @each_dtype
    def test_magnitude_of_nan_is_nan(self, dtype: DType) -> None:
        engine, w = self.engine, random((4, 64), 5, dtype)
        w[1, 3] = np.nan
        assert np.isnan(engine.magnitude(engine.from_numpy(w)))


class Conformance(ArrayConformance, Activations, Kinds):
    """All the laws. A subclass has `backend` and the models of `Surgery` and `Kinds`; and `gradient` if the engine has one."""

    @property
    def engine(self) -> Modules:
        """The backend under test, which has modules."""
        return require(choose(self.backend), Modules)

    def gradient(self, function: Callable[[Any], Any], x: Any) -> Any:
        """The gradient of the sum of `function(x)` with respect to `x`, an array of the engine."""
        pytest.skip(f"{self.backend} has no gradients")

    def test_the_gradient_passes_straight_through(self) -> None:
        """On every grid; also where a value was clipped, or is zero."""
        engine, w = self.engine, random((4, 128), 6)
        w[0, :3] = 0, -50, 50
        for grid in GRIDS:
            made = self.gradient(partial(engine.fake_quantize, grid=grid), engine.from_numpy(w))
            assert (engine.to_numpy(made) == np.ones_like(w)).all(), grid

    @pytest.mark.parametrize("ste", CHOICES["ste"])
    def test_the_compiled_gradient_is_that_of_eager(self, ste: Ste) -> None:
        """A compiler may see that rounding is flat, and train nothing."""
        engine, w = self.engine, random((4, 128), 6)
        for grid in (Grid("int4", 32), Grid("int4", 32, "minmax"), Grid("e2m1", 32), Grid("e4m3", 32, "floor")):
            made = self.gradient(_compiled(engine, grid, ste), engine.from_numpy(w))
            want = reference.unclipped(w, grid) if ste == "masked" else np.ones_like(w)
            assert (engine.to_numpy(made) == want).all(), grid

    def test_the_masked_gradient_is_zero_where_a_value_was_clipped(self) -> None:
        """On every grid; `signed` and `midmax` clip the extreme of the other sign, static scales anything."""
        engine, w = self.engine, random((4, 128), 6)
        for grid in GRIDS:
            made = self.gradient(partial(engine.fake_quantize, grid=grid, ste="masked"), engine.from_numpy(w))
            assert (engine.to_numpy(made) == reference.unclipped(w, grid)).all(), grid
            if given := static_parts(grid, w):
                scales = dict(zip(("scales", "zeros"), map(engine.from_numpy, given), strict=False))
                function = partial(engine.fake_quantize, grid=grid, ste="masked", **scales)
                inside = engine.to_numpy(self.gradient(function, engine.from_numpy(w)))
                assert 0 < np.count_nonzero(inside) < inside.size
                law = reference.unclipped(w, grid, scales=given[0], zeros=given[1] if len(given) > 1 else None)
                assert (inside == law).all()


def _compiled(engine: Arrays, grid: Grid, ste: Ste) -> Callable[[Any], Any]:
    compiled = engine.compile(lambda w: (engine.fake_quantize(w, grid, ste=ste),))
    return lambda w: compiled(w)[0]


def _same_group(shape: tuple[int, ...], place: tuple[int, ...], grid: Grid) -> NDArray[np.bool_]:
    """True in the group that holds `place`."""
    numbers = np.arange(np.prod(grid.scale_shape(shape)))[:, None]
    group = np.broadcast_to(numbers, (len(numbers), grid.group_shape(shape)[-1])).reshape(shape)
    return np.asarray(group == group[place])
