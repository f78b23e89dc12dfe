"""A new element and a new scale rule, each added to a copy of the tables: right on every engine, or refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qkit
from qkit.element import SCALE_RULES
from qkit.reference import scale_rules

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("widened.py")

#: The lines that an engineer adds, by file: before which line, and the new text.
ELEMENT = {"qkit/element.py": [("(2, 3, 4, 5, 6, 8)", "(2, 3, 4, 5, 6, 7, 8)")]}
RULE = {
    "qkit/element.py": [
        ('    "minmax": ScaleRule', '    "power": ScaleRule("integer", lambda e: reciprocal(e.highest)),\n'),
    ],
    "qkit/reference/scale_rules.py": [
        (
            "#: The symmetric rules of",
            "def power_scale(x, element):\n"
            "    peak = amax(x)\n"
            "    c = ceil_exponent(peak * np.float32(STEP[element.name, 'power']))\n"
            "    c = np.clip(c, constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE)\n"
            "    return (c << 23).astype(np.int32).view(np.float32) + poison(peak)\n\n\n",
        ),
        ('    "midmax": midmax_scale,', '    "power": power_scale,\n'),
    ],
}
GRIDS = ("int7-32-signed", "int7-row-minmax", "int4-64-power", "int7-32-power")
ARRAYS = {"quantize", "dequantize", "fake_quantize", "unclipped", "pack", "stream"}
MODULES = {"prepare", "convert", "learn", "save", "dense", "mlx", "gguf"}
#: Other programs' formats have no place for 7 bits.
REFUSED = {("int7-32-signed", "mlx"), ("int7-32-power", "mlx"), ("int7-row-minmax", "mlx")} | {
    (grid, "gguf") for grid in GRIDS if grid.startswith("int7")
}


def widened(folder):
    """A copy of qkit's core in `folder`, with the new element and the new rule."""
    shutil.copytree(ROOT / "qkit", folder / "qkit", ignore=shutil.ignore_patterns("__pycache__"))
    for file, (old, new), put in [
        *((file, edit, str.replace) for file, edits in ELEMENT.items() for edit in edits),
        *((file, edit, _before) for file, edits in RULE.items() for edit in edits),
    ]:
        path = folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (file, old)
        path.write_text(put(text, old, new), encoding="utf-8")
    return folder


def _before(text, line, new):
    return text.replace(line, new + line)


@pytest.mark.parametrize("engine", [status.name for status in qkit.backends() if status.ready])
def test_a_new_element_and_a_new_rule_are_right_or_refused_by_name(engine, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(widened(tmp_path)), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", str(SCRIPT), engine, str(tmp_path), *GRIDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {tuple(key): outcome for key, outcome in json.loads(done.stdout.splitlines()[-1])}
    operations = ARRAYS if engine == "numpy" else ARRAYS | MODULES
    assert found.keys() == {(grid, operation) for grid in GRIDS for operation in operations}
    assert {key: outcome for key, outcome in found.items() if outcome.startswith("wrong")} == {}
    refused = {key for key, outcome in found.items() if outcome.startswith("refused")}
    assert refused == {key for key in REFUSED if key in found}


def test_every_scale_rule_has_its_function_in_the_law():
    rules = {kind: {name for name, rule in SCALE_RULES.items() if rule.kind == kind} for kind in ("integer", "float")}
    assert rules["integer"] - {"minmax"} == scale_rules.SYMMETRIC_RULES.keys()
    assert rules["float"] - {"nvfp4"} == scale_rules.POWER_RULES.keys()
