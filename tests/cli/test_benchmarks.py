"""Results of benchmarks: one shape, one place, and a script for each."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").rglob("*.json"))
KEYS = ["command", "machine", "versions", "about", "note", "rows"]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_result_has_the_shape_that_measure_writes(file):
    result = json.loads(file.read_text(encoding="utf-8"))
    assert list(result) == KEYS
    assert result["rows"]
    assert all(isinstance(row, dict) for row in result["rows"])
    script = f"{file.stem.partition('-')[0]}.py"
    assert (BENCHMARKS / script).is_file()
    assert f"benchmarks/{script}" in result["command"]
    assert file.parent.parent.name == "results"


def test_every_script_is_in_the_list():
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert all(f"`{script.name}`" in page for script in BENCHMARKS.glob("*.py"))


def test_a_script_writes_that_shape_with_a_line_for_each_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["benchmarks/speed.py", "--out", "x.json", "--rows", "8"])
    from measure import Report, in_turn, quartiles, relative, spread

    report = Report(tmp_path / "x.json", packages=("no-such-package",), about={"layers": 2})
    turns = []
    found = in_turn({name: lambda name=name: (turns.append(name), 4.0)[1] for name in "ab"}, 3)
    assert found == {"a": [4.0] * 3, "b": [4.0] * 3}
    assert "".join(turns) == "baabba"
    report.add(
        {"ms": spread([1.0, 2.0, 4.0]), "share": relative([1.0, 2.0, 4.0]), "quarters": quartiles([1, 2, 3, 4, 5])}
    )
    written = json.loads((tmp_path / "x.json").read_text())
    assert list(written) == KEYS
    assert written["command"] == "python benchmarks/speed.py --rows 8"
    assert {"python", "numpy"} <= written["versions"].keys()
    assert "no-such-package" not in written["versions"]
    (row,) = written["rows"]
    assert row["ms"] == {"median": 2.0, "spread": [1.0, 4.0]}
    assert row["share"] == {"median": 2.0, "spread / median": [0.5, 2.0]}
    assert row["quarters"] == {"median": 3, "quartiles": [2, 4]}
