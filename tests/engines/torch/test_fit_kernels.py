"""The kernels of `solve`, compiled as C++ for the CPU, have the codes, scales and factors of the law, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_on_host import COMPILER, HostKernel
from qkit_torchao.arithmetic import column_loops, exact_products, fitting
from qkit_torchao.arithmetic.moments import DeviceMoments
from qkit_torchao.kernels import cuda_fit, fits, nvrtc

import qkit.reference.products
from qkit.errors import RangeError
from qkit.grid import Grid
from qkit.reference.fitting import fit

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

KERNELS = ("SEARCH", "FEED", "DESCEND", "DIGITS", "WEIGH", "SUBTRACT", "ELIMINATE", "ELIMINATE_BELOW")
GRIDS = [
    Grid("int4", 32),
    Grid("int2", 16, "absmax"),
    Grid("int3", 128),
    Grid("e2m1", 32, "even"),
    Grid("e2m1", 16, "nvfp4"),
    Grid("e4m3", 64),
    Grid("e5m2", 32),
    Grid("int4", 32, "minmax"),
    Grid("int2", 64, "minmax"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def on_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS:
        monkeypatch.setattr(cuda_fit, name, HostKernel(getattr(cuda_fit, name), folder))
    monkeypatch.setattr(cuda_fit, "WARP", 1)  # one thread has a row: contexts that take turns are slower
    monkeypatch.setattr(fits, "loops", lambda w, grid: cuda_fit.Loops)
    monkeypatch.setattr(fits, "unit_upper", cuda_fit.unit_upper)


def drawn(n: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [40, n] and moments [n, n], with a row and an input of zeros, and an input that nothing reaches."""
    draw = np.random.default_rng(n + tokens)
    x = draw.standard_normal((tokens, n)) * np.exp(draw.standard_normal(n)) + draw.standard_normal(n)
    h, w = (x.T @ x / tokens).astype(np.float32), (draw.standard_t(5, (40, n)) * 0.02).astype(np.float32)
    w[3], w[:, 7], h[9], h[:, 9] = 0, 0, 0, 0
    return w, h


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [50, 2000])
def test_kernels_have_the_codes_of_the_law(grid: Grid, tokens: int) -> None:
    n = 384 if grid.group == 128 else 320  # the last window and the last panel are short
    w, h = drawn(n, tokens)
    law, found = fit(w, grid, h, method="solve"), fitting.solve_on(w, grid, h, device=torch.device("cpu"))
    for name, part in law.parts().items():
        assert part.tobytes() == found.parts()[name].tobytes(), name


@pytest.mark.usefixtures("on_host")
def test_kernels_have_the_codes_of_the_law_where_sums_have_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (qkit.reference.products, exact_products, cuda_fit):
        monkeypatch.setattr(module, "LONGEST", 256)  # 4,096 in earnest: a test of so many inputs takes minutes
    w, h = drawn(704, 3000)
    w[5, 300:] *= 2.0**9  # errors of the second part are larger from its middle on
    law, found = (
        fit(w, GRIDS[0], h, method="solve"),
        fitting.solve_on(w, GRIDS[0], h, device=torch.device("cpu")),
    )
    for name, part in law.parts().items():
        assert part.tobytes() == found.parts()[name].tobytes(), name


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(
    "grid",
    [GRIDS[0], GRIDS[4], *(pytest.param(grid, marks=pytest.mark.size) for grid in (*GRIDS[2:4], GRIDS[-1]))],
    ids=str,
)
def test_teams_of_threads_have_the_codes_of_the_law(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fit, "WARP", 32)
    w, h = (a[:6] if len(a) == 40 else a for a in drawn(256 if grid.group == 128 else 160, 500))
    law, found = fit(w, grid, h, method="solve"), fitting.solve_on(w, grid, h, device=torch.device("cpu"))
    for name, part in law.parts().items():
        assert part.tobytes() == found.parts()[name].tobytes(), name


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("n", [32, 96, 1056])
def test_kernels_have_the_sums_of_the_law(n: int) -> None:
    d, product = torch.randn(2, 5, n, dtype=torch.float64)
    known, x = DeviceMoments.of(np.eye(n, dtype=np.float32), torch.device("cpu")), d.T
    of_both = [
        (kind(x, x[:1], GRIDS[0], known, 1.0), product.T.clone()) for kind in (column_loops.Loops, cuda_fit.Loops)
    ]
    for wanted, found in zip(*(loops.weigh(x, residual) for loops, residual in of_both), strict=True):
        assert torch.equal(wanted, found)
    assert torch.equal(of_both[0][1], of_both[1][1])
    assert torch.equal(*(loops.error(x, residual) for loops, residual in of_both))


def test_products_of_digits_have_the_codes_of_the_law() -> None:
    folder = Path(__file__).parents[2]
    run = [sys.executable, "-P", folder / "interpreted_digits.py"]
    done = subprocess.run(
        run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)}, check=False
    )
    assert done.stdout.split() == ["exact"] * 4, done.stderr


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("n", [16, 64, 200, 600])
def test_kernels_have_the_factor_of_the_law(n: int) -> None:
    h = torch.tensor(drawn(n, 3 * n)[1]).double() + 0.1 * torch.eye(n)
    assert torch.equal(cuda_fit.unit_upper(h), exact_products.unit_upper(h))
    h[1, 2] = h[2, 1] = 50
    with pytest.raises(RangeError, match="a negative direction"):
        cuda_fit.unit_upper(h)


def test_kernels_take_the_groups_that_fit_a_window() -> None:
    assert [group for group in (8, 16, 32, 48, 64, 128, 192, 256) if cuda_fit.takes(Grid("int4", group), 768)] == [
        16,
        32,
        64,
        128,
    ]
    assert cuda_fit.takes(Grid("int4", "row"), 64)
    assert not cuda_fit.takes(Grid("int4", "row"), 96)


def test_the_compiler_contracts_nothing() -> None:
    assert all(nvrtc_kernel.options == ("--fmad=false",) for nvrtc_kernel in (getattr(cuda_fit, k) for k in KERNELS))
    assert all("contract" not in option and "fmad" not in option for option in nvrtc.OPTIONS)
