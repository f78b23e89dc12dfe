"""Calibration of other kinds of models: of those with other names in files, and of those whose blocks do not run alone."""

import sys
from pathlib import Path

import numpy as np
import pytest

import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.errors import BackendError
from qkit.fitting.fits import Fit
from qkit.fitting.statistics import open_statistics
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

sys.path.append(str(Path(__file__).parents[1] / "families"))
from catalogue import FAMILIES, make

ROWS = np.random.default_rng(0).integers(0, 60, (10, 32)).astype(np.int32)
RECIPE = "int3-g32"
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning", "ignore::qkit.errors.FamilyWarning")


@pytest.mark.parametrize("family", ["Llava", "Qwen2-VL"])
def test_statistics_go_by_the_names_in_files_and_in_the_model(family: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path / "model")
    engine, recipe = qkit.backend("torchao"), qkit.recipe(RECIPE)
    for name, statistics in (
        ("plain", calibrate(tmp_path / "model", tmp_path / "plain", ROWS, engine=engine)),
        ("drift", calibrate_drift(tmp_path / "model", tmp_path / "drift", ROWS, engine=engine, recipe=recipe)),
    ):
        how = Fit("solve", statistics)
        plan = make_plan(tmp_path / "model", recipe, fit=how)
        assert plan.by_search == ()
        out = quantize_directory(
            plan, tmp_path / f"out-{name}", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None
        )
        opened = qkit.load(out, backend=engine)
        converted = qkit.convert(qkit.load(tmp_path / "model", backend=engine), recipe, fit=how)
        theirs = {layer.path: layer for layer in engine.layers(opened)}
        checked = 0
        for layer in engine.layers(converted):
            if layer.stage == "converted":
                assert (engine.unpack(layer.module).codes == engine.unpack(theirs[layer.path].module).codes).all()
                checked += 1
            elif layer.head and name == "drift":
                assert (engine.weight(layer.module) == engine.weight(theirs[layer.path].module)).all()
        assert checked == len(open_statistics(statistics).paths)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Bloom", "does not run on several rows by itself"),
        ("T5", "does not run on tokens alone"),
        ("Gemma 4", "takes more than states from the tokens"),
    ],
)
def test_models_whose_blocks_do_not_run_by_themselves_are_refused(family: str, message: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path / "model")
    with pytest.raises(BackendError, match=f"{message}.*fit by search"):
        calibrate(tmp_path / "model", tmp_path / "stats", ROWS, engine=qkit.backend("torchao"))
    assert not (tmp_path / "stats").exists()


def test_experts_that_all_get_every_token_are_fitted_by_search(tmp_path: Path) -> None:
    make(FAMILIES["Llama 4"], tmp_path / "model")
    statistics = calibrate(tmp_path / "model", tmp_path / "stats", ROWS, engine=qkit.backend("torchao"))
    plan = make_plan(tmp_path / "model", qkit.recipe(RECIPE), fit=Fit("solve", statistics))
    assert plan.by_search
    assert all(".experts." in path for path in plan.by_search)
