"""`solve` on a torch device has the codes and scales of the law, to the bit."""

import numpy as np
import pytest
import torch
from qkit_torchao.arithmetic.fitting import DeviceMoments, solve_on

from qkit.errors import GridError, RangeError
from qkit.grid import Grid
from qkit.reference.fitting import fit

GRIDS = [
    *(Grid(element, 32) for element in ("int2", "int3", "int4", "int8", "e2m1", "e4m3")),
    Grid("int4", 32, "absmax"),
    Grid("e2m1", 32, "even"),
    Grid("e2m1", 16, "nvfp4"),
    Grid("int4", "row"),
    Grid("int4", 320),
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [50, 2000])
def test_the_device_has_the_codes_of_the_law(device: str, grid: Grid, tokens: int) -> None:
    n, draw = 320, np.random.default_rng(0)
    x = draw.standard_normal((tokens, n)) * np.exp(draw.standard_normal(n)) + draw.standard_normal(n)
    h, w = (x.T @ x / tokens).astype(np.float32), (draw.standard_t(5, (40, n)) * 0.02).astype(np.float32)
    w[3], w[:, 7], h[9], h[:, 9] = 0, 0, 0, 0  # a row and an input of zeros, and one that nothing reaches
    law, found = fit(w, grid, h, method="solve"), solve_on(w, grid, h, device=torch.device(device))
    for name, part in law.parts().items():
        assert part.tobytes() == found.parts()[name].tobytes(), name


def test_other_grids_and_moments_are_refused() -> None:
    w, h = np.ones((4, 32), np.float32), np.eye(32, dtype=np.float32)
    for grid in (Grid("int4", "tensor"), Grid("int4", 32, "minmax")):
        with pytest.raises(GridError, match=r"fitted by qkit\.fit alone"):
            solve_on(w, grid, h, device=torch.device("cpu"))
    h[0, 1] = h[1, 0] = 5
    with pytest.raises(RangeError, match="a negative direction"):
        DeviceMoments.of(h, torch.device("cpu"))
