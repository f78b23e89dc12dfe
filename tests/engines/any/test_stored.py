"""New codes on stored scales: every engine gives those of the reference, which adapters on read grids merge into."""

from importlib import import_module

import numpy as np
import pytest

import qkit
from qkit.engines.registry import backend as choose
from qkit.reference import stored as law
from qkit.testing.hard_tensors import random
from qkit.testing.read_tensors import read_grids, read_tensors

ENGINES = {"torchao": "qkit_torchao.arithmetic.stored", "mlx": "qkit_mlx.arithmetic.stored"}


@pytest.mark.parametrize("grid", read_grids(), ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_new_codes_their_values_and_the_mask_equal_the_reference(name, grid):
    if name not in [one.name for one in qkit.backends() if one.ready]:
        pytest.skip(f"{name} is not here")
    engine, mine = choose(name), import_module(ENGINES[name])
    for number, q in enumerate(read_tensors(grid)):
        w = random(q.shape, number, q.dtype)
        w[1, 3] = -0.0
        theirs, x = q.map(engine.from_numpy), engine.from_numpy(w)
        made, want = mine.requantize(x, theirs), law.requantize(w, q)
        for part, array in want.parts().items():
            assert np.array_equal(engine.to_numpy(made.parts()[part]), array), (part, q.dtype)
        assert np.array_equal(engine.to_numpy(mine.unclipped(x, theirs)), law.unclipped(w, q))
        w[2, 5], w[3, 7] = np.nan, -np.inf
        values = engine.to_numpy(mine.fake_requantize(engine.from_numpy(w), theirs))
        assert np.array_equal(values, law.fake_requantize(w, q), equal_nan=True)
