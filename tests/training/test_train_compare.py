"""From training to the page: `qkit compare` takes what two runs of `qkit train` left, on each engine."""

import json
import sys

import pytest
from runs import folder
from tables import TRAINERS as ENGINES

from qkit.cli.application import main

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")


def qkit(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["qkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)


@pytest.mark.parametrize("name", ENGINES)
def test_what_two_runs_left_is_compared_with_their_masters(tmp_path, monkeypatch, name):
    monkeypatch.chdir(folder(tmp_path))
    run = ("--data", "*.txt", "--steps", 20, "--batch", 2, "--length", 16, "--learning-rate", "1e-3", "--backend", name)
    qkit(monkeypatch, "train", "model", "longer", "-r", "float", *run)
    qkit(monkeypatch, "train", "model", "trained", "-r", "int2-g32", *run)
    models = ("--qat", "trained", "--longer", "longer", "--deploy-recipe", "int3-g32")
    measured = ("--data", "*.txt", "--length", 16, "--windows", 12, "--backend", name)
    qkit(monkeypatch, "compare", "model", *models, *measured, "--out", "report")
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "trained.run/checkpoint-00000020.safetensors" in found["masters"]
    equal, numbers = found["masters_equal"]
    assert equal == numbers > 0
    assert "int3-g32" in (tmp_path / "report" / "report.html").read_text()
