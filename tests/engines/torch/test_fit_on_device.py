"""`solve` on a torch device has the codes and scales of the law, to the bit, and is taken there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make
from qkit_torchao.arithmetic.fitting import solve_on
from qkit_torchao.arithmetic.moments import DeviceMoments
from qkit_torchao.backend import TorchaoBackend

import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.errors import GridError, RangeError
from qkit.grid import Grid
from qkit.reference.fitting import fit
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="windows of kernels are those of a GPU")
@pytest.mark.parametrize("grid", [*GRIDS[1:3], GRIDS[7], GRIDS[8], Grid("int4", 64), Grid("int3", 128)], ids=str)
def test_cuda_has_the_codes_of_the_law_over_several_windows(grid: Grid) -> None:
    n, draw = 2176, np.random.default_rng(1)
    x = draw.standard_normal((3000, n)) * np.exp(draw.standard_normal(n)) + draw.standard_normal(n)
    h, w = (x.T @ x / len(x)).astype(np.float32), (draw.standard_t(5, (12, n)) * 0.02).astype(np.float32)
    law, found = fit(w, grid, h, method="solve"), solve_on(w, grid, h, device=torch.device("cuda"))
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


class OnDevice(TorchaoBackend):
    """The engine as it is on a GPU, on the device at hand; it counts the weights that it solves."""

    solved = 0

    def solves(self, grid: Grid) -> bool:
        return grid.group != "tensor" and grid.scale != "minmax"

    def solve(self, w: Any, grid: Grid, moments: Any, *, peak: float | None = None) -> qkit.QTensor[Any]:
        type(self).solved += 1
        return super().solve(w, grid, moments, peak=peak)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = np.random.default_rng(3).integers(0, 200, (20, 128)).astype(np.int32)
    return calibrate(model, tmp_path_factory.mktemp("stats") / "stats", rows, engine=TorchaoBackend())


@pytest.mark.parametrize("recipe", ["int3-g32", "nvfp4-a16"])
def test_directories_that_a_device_solves_have_the_same_bytes(
    recipe: str, model: Path, stats: Path, tmp_path: Path
) -> None:
    plan, found = make_plan(model, qkit.recipe(recipe), fit=qkit.Fit("solve", stats)), []
    for engine in (qkit.backend("numpy"), OnDevice()):
        OnDevice.solved, out = 0, tmp_path / engine.name
        quantize_directory(plan, out, engine=engine, workers=2, tick=lambda *_: None)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert OnDevice.solved == sum(row.rule is not None for row in plan.rows)


def test_layers_and_arrays_are_solved_on_their_device(model: Path, stats: Path) -> None:
    OnDevice.solved, engine = 0, OnDevice()
    made = [
        qkit.convert(qkit.load(model, backend="torchao"), "int4-g32", fit=qkit.Fit("solve", stats), backend=one)
        for one in (engine, TorchaoBackend())
    ]
    assert OnDevice.solved
    for one, other in zip(*(engine.tensors(each).values() for each in made), strict=True):
        assert torch.equal(one, other)
    w, h = torch.randn(8, 64), np.eye(64, dtype=np.float32) + 0.5
    before = OnDevice.solved
    assert torch.equal(
        qkit.fit(w, "int3-g32", h, method="solve", backend=engine).codes,
        qkit.fit(w, "int3-g32", h, method="solve").codes,
    )
    assert OnDevice.solved == before + 1


def test_drift_is_solved_on_the_device(model: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(3).integers(0, 200, (4, 128)).astype(np.int32)
    OnDevice.solved, found = 0, []
    for engine in (OnDevice(), TorchaoBackend()):
        out = calibrate_drift(
            model, tmp_path / type(engine).__name__, rows, engine=engine, recipe=qkit.recipe("int4-g32")
        )
        found.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert found[0] == found[1]
    assert OnDevice.solved


def test_only_a_gpu_is_asked() -> None:
    engine = TorchaoBackend()
    assert not engine.solves(Grid("int4", 32))
    engine.device = torch.device("cuda")
    assert engine.solves(Grid("int4", 32))
    assert not engine.solves(Grid("int4", "tensor"))
    assert not engine.solves(Grid("int4", 32, "minmax"))
