"""The picture of a fit: the error of each layer by the rule, and fitted."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from models import make
from typer.testing import CliRunner

import qkit
from qkit import reference
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.drift_calibration import calibrate_drift
from qkit.fitting.fits import Fit
from qkit.fitting.statistics import open_statistics
from qkit.reference.fitting import fit
from qkit.report.fit_picture import layer_errors
from qkit.storage.read import read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

TOKENS = np.random.default_rng(3).integers(0, 200, (24, 64)).astype(np.int32)
pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("float") / "model", "llama"))


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(model, tmp_path_factory.mktemp("stats") / "stats", TOKENS, engine=qkit.backend("torchao"))


def quantize(model: Path, out: Path, recipe: str, how: Fit) -> Path:
    plan = make_plan(model, qkit.recipe(recipe), fit=how)
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


def test_errors_are_those_of_the_outputs(model: Path, stats: Path, tmp_path: Path) -> None:
    out = quantize(model, tmp_path / "out", "int3-g32", Fit("solve", stats))
    found, known = {one.path: one for one in layer_errors(model, out, Fit("solve", stats))}, open_statistics(stats)
    assert found.keys() == known.paths
    path, grid = "model.layers.1.mlp.down_proj", qkit.Grid("int3", 32)
    w, h = read_folder(model)[0][f"{path}.weight"].mapped().astype(np.float64), known.moments(path).astype(np.float64)
    outputs = np.einsum("ij,jk,ik->", w, h, w)
    for q, share in (
        (reference.quantize(w.astype(np.float32), grid), found[path].before),
        (fit(w.astype(np.float32), grid, known.moments(path), method="solve"), found[path].after),
    ):
        d = w - reference.dequantize(q)
        assert share == pytest.approx(np.einsum("ij,jk,ik->", d, h, d) / outputs, rel=1e-9)
    assert all(one.after < one.before for one in found.values())


@pytest.mark.parametrize("recipe", ["int2-g32", "nvfp4-a16", "mxfp4-a16"])
def test_corrected_layers_are_measured_from_their_aims(recipe: str, model: Path, tmp_path: Path) -> None:
    chosen = qkit.recipe(recipe)
    stats = calibrate_drift(model, tmp_path / "drift", TOKENS, engine=qkit.backend("torchao"), recipe=chosen)
    out = quantize(model, tmp_path / "out", recipe, Fit("solve", stats))
    found = list(layer_errors(model, out, Fit("solve", stats)))
    assert len(found) == 14
    assert all(one.after < 0.9 * one.before for one in found)


def test_the_command_draws_two_columns_for_each_layer(model: Path, stats: Path, tmp_path: Path) -> None:
    words = ["quantize", model, tmp_path / "out", "-r", "int4-g32", "--fit", "search", "--stats", stats]
    ran = CliRunner().invoke(application, [str(word) for word in (*words, "--picture", tmp_path / "fit.svg")])
    assert ran.exit_code == 0, ran.output
    text = (tmp_path / "fit.svg").read_text(encoding="utf-8")
    said = [one.text or "" for one in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]
    shares = [float(re.search(r": ([0-9.]+)%", one)[1]) for one in said if one.startswith("model.layers")]
    assert len(shares) == 28
    assert all(0 < fitted <= rule for rule, fitted in zip(shares[::2], shares[1::2], strict=True))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded


def test_a_picture_of_nothing_fitted_is_refused(model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(model), str(tmp_path / "out"), "-r", "int4-g32", "--picture", str(tmp_path / "fit.svg")]
    ran = CliRunner().invoke(application, words)
    assert ran.exit_code == 2
    assert "--picture belongs to --fit" in ran.output
    ran = CliRunner().invoke(application, [*words, "--fit", "search", "--part", "1/2"])
    assert ran.exit_code == 2
    assert "--picture wants all parts" in ran.output
    assert not (tmp_path / "out").exists()
