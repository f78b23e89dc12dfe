"""The kernels of `solve`, compiled as C++ for the CPU, have the codes, scales and factors of the law, to the bit."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_on_host import COMPILER, HostKernel
from qkit_torchao.arithmetic import column_loops, exact_products, fitting, moments, rounding
from qkit_torchao.arithmetic.moments import DeviceMoments
from qkit_torchao.kernels import cuda_factor, cuda_fit, cuda_moments, fits, nvrtc

import qkit.reference.fitting
import qkit.reference.products
from qkit.errors import RangeError
from qkit.grid import Grid
from qkit.reference.fitting import fit

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

KERNELS = [
    (module, name)
    for module in (cuda_fit, cuda_factor, cuda_moments)
    for name, value in vars(module).items()
    if isinstance(value, nvrtc.Kernel)
]
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
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, HostKernel(getattr(module, name), folder))
    monkeypatch.setattr(cuda_fit, "WARP", 1)  # one thread has a row: contexts that take turns are slower
    monkeypatch.setattr(fits, "loops", lambda w, grid: cuda_fit.Loops)
    monkeypatch.setattr(fits, "moments", lambda h: cuda_moments)
    monkeypatch.setattr(fits, "have_digits", lambda device: False)


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
    for module in (qkit.reference.fitting, column_loops, cuda_fit):
        monkeypatch.setattr(module, "WINDOW", 256)
    w, h = drawn(704, 3000)
    w[5, 300:] *= 2.0**9  # errors of the second part are larger from its middle on
    law, found = (
        fit(w, GRIDS[0], h, method="solve"),
        fitting.solve_on(w, GRIDS[0], h, device=torch.device("cpu")),
    )
    for name, part in law.parts().items():
        assert part.tobytes() == found.parts()[name].tobytes(), name


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("sure", [0.999, 0.5, -1.0])  # no row is sure to err less: the last round is completed
def test_kernels_compare_the_last_error_with_that_of_search(sure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (qkit.reference.fitting, column_loops, cuda_fit):
        monkeypatch.setattr(module, "WINDOW", 128)
    monkeypatch.setattr(cuda_fit, "SURE", sure)
    w, h = drawn(320, 40)
    known, x = DeviceMoments.of(h, torch.device("cpu")), torch.tensor(w)
    s = rounding.scale_values(rounding.quantize(x, GRIDS[0])).double()
    laid = [cuda_fit.Loops.laid(a) for a in (x, s)]
    allowed = torch.linspace(0, 2, 40, dtype=torch.float64) * 1e-3
    found = []
    for kind in (column_loops.Loops, cuda_fit.Loops):
        loops = kind(laid[0], torch.zeros_like(laid[1]), GRIDS[0], known, 1.0)
        units, scales = loops.feed(laid[1]), laid[1].clone()
        residual = loops.times(d := loops.differ(units, scales))
        begun, _ = loops.weigh(d, residual)
        for last in (False, True):
            assert loops.descend(units, scales, residual, last=last)
        found.append(loops.exceeds(allowed * begun.mean() * 1e3, units, scales, residual, begun=begun))
    assert torch.equal(*found)
    assert found[0].any()
    assert not found[0].all()


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


def hard(name: str) -> tuple[torch.Tensor, np.ndarray]:
    """A weight [1000, 64] and moments on which fp32 has a hard time."""
    draw = np.random.default_rng(7)
    x, w = draw.standard_normal((500, 64)), draw.standard_normal((1000, 64)) * 0.02
    if name == "ties":  # quotients by a scale that is tried lie in the middle of two codes
        f = 0.7 + draw.integers(0, 20, (1000, 1)) * (0.45 / 19)
        s = torch.tensor(w[:, :1] * f).bfloat16().double().numpy()
        w = np.where(draw.random(w.shape) < 0.9, (draw.integers(-8, 8, w.shape) + 0.5) * s, 0)
        w[:, ::32] = np.abs(s / f) * 8
    elif name == "outliers":
        x[:, ::9] *= 300
        w[:, 5] *= 2.0**20
    elif name == "one direction":
        draw = np.random.default_rng(
            1
        )  # errors are squares of sums that cancel: in row 51 fp32 finds another least one
        w, direction = (draw.standard_normal((6000, 64)) * 0.02)[3900:4900], draw.standard_normal(64)
        x = draw.standard_normal((500, 1)) * direction + 1e-3 * draw.standard_normal((500, 64))
    elif name == "dead":
        x[:, :40], w[:, 8], w[9] = 0, 0, 0
    h = (x.T @ x / len(x)).astype(np.float32)
    scaled = {"large": (2.0**60, 2.0**90), "small": (2.0**-60, 2.0**-95)}.get(name, (1.0, 1.0))
    return torch.tensor(w * scaled[0], dtype=torch.float32), h * np.float32(scaled[1])


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("name", ["plain", "ties", "outliers", "one direction", "dead", "large", "small"])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], Grid("int8", 32)], ids=str)
def test_scales_that_fp32_rules_out_are_not_the_best(grid: Grid, name: str) -> None:
    w, h = hard(name)
    known = DeviceMoments.of(h, torch.device("cpu"))
    s = rounding.scale_values(rounding.quantize(w, grid)).double()
    laid = cuda_fit.Loops.laid(w), cuda_fit.Loops.laid(s)
    of_both = [
        kind(laid[0], torch.zeros_like(laid[1]), grid, known, 1.0).search(laid[1])
        for kind in (column_loops.Loops, cuda_fit.Loops)
    ]
    for wanted, found in zip(*of_both, strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.usefixtures("on_host")
def test_quotients_between_two_codes_go_to_the_even_one() -> None:
    draw = np.random.default_rng(5)
    s = torch.tensor(draw.uniform(0.01, 0.02, (100, 2))).bfloat16().double()
    w = (torch.tensor(draw.integers(-9, 9, (100, 64))) + 0.5) * s.repeat_interleave(32, 1)
    known = DeviceMoments.of(np.eye(64, dtype=np.float32), torch.device("cpu"))  # no input makes up for another
    laid = cuda_fit.Loops.laid(w), cuda_fit.Loops.laid(s)
    found = cuda_fit.Loops(laid[0], torch.zeros_like(laid[1]), GRIDS[0], known, 1.0).feed(laid[1])
    assert torch.equal(found.T, (w / s.repeat_interleave(32, 1)).round().clamp(-8, 7))


@pytest.mark.usefixtures("on_host")
def test_few_scales_are_left_to_try() -> None:
    w, h = hard("plain")
    tried = []
    kernel = cuda_fit.SEARCH

    def watch(constants: Any, programs: Any, threads: int, arguments: tuple[int, ...]) -> None:
        if arguments[6]:
            bits = (ctypes.c_uint64 * (1000 * 2)).from_address(arguments[6])
            tried.extend(one.bit_count() for one in bits)
        kernel(constants, programs, threads, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_fit, "SEARCH", watch)
        fitting.solve_on(w.numpy(), GRIDS[0], h, device=torch.device("cpu"))
    assert len(tried) == 2000
    assert sum(tried) < 1.2 * 2000


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
    order = torch.randperm(n)
    assert torch.equal(cuda_moments.factor(h, order, 0.5), moments.factor(h, order, 0.5))
    h[1, 2] = h[2, 1] = 50
    with pytest.raises(RangeError, match="a negative direction"):
        cuda_moments.factor(h, order, 0.5)


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
    assert all(getattr(*one).options == ("--fmad=false",) for one in KERNELS)
    assert all("contract" not in option and "fmad" not in option for option in nvrtc.OPTIONS)
