"""Calibration on a GPU: the metric, corrected drift, coupled rows, experts and learned rounding, beside those of the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make

import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.engines.blocks import Lesson
from qkit.fitting.fits import Fit
from qkit.fitting.run import Run
from qkit.fitting.statistics import open_statistics
from qkit.metric import gather_metrics, metrics_of
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

TOKENS = np.random.default_rng(3).integers(0, 200, (8, 128)).astype(np.int32)
FAMILIES = ("llama", "gpt_neox", "qwen3_moe")
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
pytestmark = [on_devices, pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("float")
    return {family: Path(make(place / family, family)) for family in FAMILIES}


def engine_on(device: str) -> Any:
    return qkit.backend("torchao").on(device)


def apart(folder: Path, other: Path) -> float:
    """Mean squared difference of the logits of two directories."""
    engine = qkit.backend("torchao")
    one, two = (engine.logits(qkit.load(place, backend=engine), TOKENS) for place in (folder, other))
    return float(np.mean((one - two) ** 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_are_those_of_the_cpu(device: str, family: str, models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for name in ("cpu", device):
        engine = engine_on(name).mapping()
        model = qkit.load(models[family], backend=engine)
        blocks = engine.blocks(model, length=TOKENS.shape[1])
        paths = [layer.path for layer in engine.layers(model) if layer.kind == "linear"]
        watched = [[path for path in paths if path.startswith(f"{where}.")] for where in blocks.paths]
        run = Run(tmp_path / name, {}, {}, batch=4)
        gather_metrics(run, blocks, TOKENS, watched, batch=4)
        found.append([metrics_of(run, number) for number in range(len(blocks.paths))])
    for mine, want in zip(found[1], found[0], strict=True):
        assert mine.keys() == want.keys()
        for path, f in want.items():
            assert np.abs(mine[path] - f).max() <= 1e-3 * np.abs(f).max()  # other kernels, and labels near an edge


@pytest.mark.parametrize(
    ("family", "recipe"), [("llama", "int3-g32"), ("llama", "nvfp4-a16"), ("qwen3_moe", "int3-g32")]
)
def test_a_corrected_model_is_nearer_and_has_the_codes_of_the_law(
    device: str, family: str, recipe: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder, engine, chosen = models[family], engine_on(device), qkit.recipe(recipe)
    plain = calibrate(folder, tmp_path / "plain", TOKENS, engine=engine)
    drift = calibrate_drift(folder, tmp_path / "drift", TOKENS, engine=engine, recipe=chosen)
    outs = []
    for stats, by in ((plain, engine), (drift, engine), (drift, qkit.backend("numpy"))):
        plan, out = make_plan(folder, chosen, fit=Fit("solve", stats)), tmp_path / f"out-{len(outs)}"
        outs.append(quantize_directory(plan, out, engine=by, workers=1, tick=lambda *_: None))
    assert apart(folder, outs[1]) < 0.95 * apart(folder, outs[0])
    files = [{file.name: file.read_bytes() for file in out.glob("*.safetensors")} for out in outs[1:]]
    assert files[0] == files[1]


def test_an_interrupted_correction_ends_with_the_same_bytes(
    device: str, models: dict[str, Path], tmp_path: Path
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    given = {"engine": engine_on(device), "recipe": qkit.recipe("int3-g32")}
    whole = calibrate_drift(models["llama"], tmp_path / "whole", TOKENS, **given)
    with pytest.raises(KeyboardInterrupt):
        calibrate_drift(models["llama"], tmp_path / "stats", TOKENS, tick=stop, **given)
    again = calibrate_drift(models["llama"], tmp_path / "stats", TOKENS, **given)
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }


@pytest.mark.parametrize("recipe", [None, "int8-dynamic-act-int4-weight"])
def test_experts_have_the_moments_of_the_cpu(
    device: str, recipe: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    chosen = qkit.recipe(recipe) if recipe else None
    mine, want = (
        open_statistics(calibrate(models["qwen3_moe"], tmp_path / name, TOKENS, engine=engine_on(name), recipe=chosen))
        for name in (device, "cpu")
    )
    assert mine.paths == want.paths
    assert mine.few == want.few
    experts = [path for path in want.paths if ".experts." in path]
    assert experts
    near = 1e-4 if recipe is None else 0.02  # sums of fp32; rounded inputs at an edge differ by a step of eight bits
    for path in experts:
        assert mine.about["layers"][path]["tokens"] == want.about["layers"][path]["tokens"]
        assert np.abs(mine.moments(path) - want.moments(path)).max() <= near * np.abs(want.moments(path)).max()


def test_learned_rounding_is_nearer_than_solved_codes(device: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder, engine, recipe = models["llama"], engine_on(device), qkit.recipe("int2-g32")
    outs = []
    for method, lesson in (("solve", None), ("round", Lesson(steps=40, batch=4))):
        stats = calibrate_drift(folder, tmp_path / method, TOKENS, engine=engine, recipe=recipe, lesson=lesson)
        plan = make_plan(folder, recipe, fit=Fit(method, stats))
        outs.append(
            quantize_directory(plan, tmp_path / f"{method}-out", engine=engine, workers=1, tick=lambda *_: None)
        )
    assert apart(folder, outs[1]) < apart(folder, outs[0])
