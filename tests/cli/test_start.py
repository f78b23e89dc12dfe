"""How the command line starts: it looks for no garbage in its imports, and other programs keep the collector as it is."""

import gc
import runpy
import subprocess
import sys

import pytest

from qkit.cli.groups import Commands
from qkit.startup import uncollected


def start_as(monkeypatch, argv, *, words=()):
    monkeypatch.setattr(sys, "argv", [*argv])
    monkeypatch.setattr(sys, "orig_argv", ["python", *(words or argv)])


@pytest.fixture
def frozen():
    """How many objects the collector has set aside; none are left aside after the test."""
    before = gc.get_freeze_count()
    yield lambda: gc.get_freeze_count() - before
    gc.unfreeze()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/bin/qkit", "plan"], ()),
        (["-m", "plan"], ("-m", "qkit", "plan")),
        (["/lib/qkit/__main__.py", "plan"], ("-m", "qkit", "plan")),
    ],
)
def test_the_command_line_collects_nothing_while_it_imports(argv, words, monkeypatch, frozen):
    start_as(monkeypatch, argv, words=words)
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen() > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train.py"], ()),
        (["/lib/other/__main__.py"], ("-m", "other")),
        (["/app/__main__.py"], ("/app",)),  # python DIRECTORY
    ],
)
def test_other_programs_keep_their_collector(argv, words, monkeypatch, frozen):
    start_as(monkeypatch, argv, words=words)
    with uncollected():
        assert gc.isenabled()
    assert frozen() == 0


def test_a_program_without_a_collector_keeps_none(monkeypatch, frozen):
    start_as(monkeypatch, ["qkit"])
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert frozen() == 0


def test_the_module_is_the_command_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qkit", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("qkit", run_name="__main__")
    assert capsys.readouterr().out.startswith("qkit ")


def test_a_command_is_imported_when_it_is_asked_for():
    code = "import sys; import qkit.cli; print(*sorted({'numpy', 'qkit.streaming', 'qkit.cli.quantize'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_command_of_the_groups_has_its_module():
    found = Commands()
    assert len(found) == len(list(found)) == len(set(found))
    assert [found[name].name for name in found] == list(found)
    assert found["plan"] is found["plan"]
    with pytest.raises(KeyError):
        found["quantise"]
