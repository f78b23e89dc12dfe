"""The laws of read grids, whose scales are those of a file. Part of `Conformance`."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from qkit import reference
from qkit.engines.protocol import Arrays
from qkit.engines.registry import backend as choose
from qkit.errors import GridError
from qkit.grid import Grid
from qkit.testing.hard_tensors import random
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors

GRIDS = read_grids()
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


class ReadGrids:
    """Laws of decoding. A subclass names the engine in `backend`."""

    backend: ClassVar[str]

    @property
    def engine(self) -> Arrays:
        """The backend under test."""
        return choose(self.backend)

    @each_grid
    def test_the_values_of_a_read_grid_equal_the_reference(self, grid: Grid) -> None:
        """One fp32 product, rounded; under `affine` one sum, rounded; then one rounding to the type of the tensor."""
        engine = self.engine
        for q in read_tensors(grid):
            made, want = engine.to_numpy(engine.dequantize(q.map(engine.from_numpy))), reference.dequantize(q)
            assert made.dtype == want.dtype
            assert np.array_equal(made, want, equal_nan=True), (grid, q.dtype, q.scales.dtype)

    def test_compiled_values_of_read_grids_equal_the_reference(self) -> None:
        """A compiler may join the product and the sum of `affine`, and round once instead of twice."""
        engine = self.engine
        for name in ("int4-g32-affine", "int8-g64-affine", "e2m1-g16-stored-nvfp4-inverse", "e4m3-row-stored"):
            q = read_tensor(Grid.parse(name), "float32")
            names, arrays = zip(*q.parts().items(), strict=True)

            def decode(*parts: Any, names: Any = names, q: Any = q) -> tuple[Any, ...]:
                return (engine.dequantize(replace(q, **dict(zip(names, parts, strict=True)))),)

            made = engine.to_numpy(engine.compile(decode)(*map(engine.from_numpy, arrays))[0])
            assert np.array_equal(made, reference.dequantize(q), equal_nan=True), name

    @each_grid
    def test_no_rule_quantizes_onto_a_read_grid(self, grid: Grid) -> None:
        engine, w = self.engine, self.engine.from_numpy(random((6, 128), 1))
        for function in (engine.quantize, engine.fake_quantize, engine.unclipped):
            with pytest.raises(GridError, match=r"is a read grid: its scales are those of a file"):
                function(w, grid)
