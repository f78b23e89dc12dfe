"""The rooms of qkit: which package imports which. A module at the top of qkit counts as a package of its own."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

QKIT = Path(__file__).parents[2] / "qkit"
FILES = ("storage", "formats", "artifact", "exchange")  #: each may import those before it
CHECKED = ("storage", "formats", "artifact", "streaming", "exchange")


def imported(file):
    """The packages of qkit that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "qkit":
                yield rest[0] if rest and is_package(rest[0]) else "qkit"


def is_package(name):
    return (QKIT / name).is_dir() or (QKIT / f"{name}.py").is_file()


@pytest.fixture(scope="module")
def arrows():
    """By package, the others that it imports."""
    found = {}
    for file in sorted(QKIT.rglob("*.py")):
        inner = file.relative_to(QKIT).with_suffix("").parts[0]
        package = "qkit" if inner == "__init__" else inner
        found.setdefault(package, set()).update(set(imported(file)) - {package})
    assert {"qkit", "errors", *CHECKED} <= set(found)
    return found


def test_no_two_packages_import_each_other(arrows):
    pairs = {tuple(sorted((one, other))) for one in arrows for other in arrows[one] if one in arrows[other]}
    assert not pairs


def test_no_packages_import_each_other_in_a_circle(arrows):
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_storage_knows_no_grid(arrows):
    assert arrows["storage"] <= {"errors", "intake"}


@pytest.mark.parametrize("package", FILES)
def test_a_room_of_files_imports_none_above_it(arrows, package):
    above = {*FILES[FILES.index(package) + 1 :], "streaming"}
    assert not arrows[package] & above


def test_streaming_and_exchange_stand_side_by_side(arrows):
    assert "exchange" not in arrows["streaming"]
    assert "streaming" not in arrows["exchange"]


@pytest.mark.parametrize("package", CHECKED)
def test_commands_reports_and_training_stand_above_the_files(arrows, package):
    assert not arrows[package] & {"qkit", "adapters", "training", "evaluation", "report", "demo", "testing", "cli"}
