"""The README keeps its word: its blocks run, its commands exist, its tables are those that were measured."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
ENGINES = {status.name for status in qkit.backends() if status.ready}


@pytest.mark.skipif(not {"torchao", "mlx"} <= ENGINES, reason="the tour visits both engines")
def test_the_tour_runs_from_the_first_block_to_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 6
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^\$ qkit (\w+)", TEXT, flags=re.MULTILINE))))
def test_the_commands_exist(command):
    assert CliRunner().invoke(application, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)`?", TEXT))))
def test_the_make_targets_exist(target):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
