"""A shell completes recipes, engines and paths: `qkit --install-completion`."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from qkit.cli.application import application
from qkit.cli.completing import recipe_names


def offered(line, monkeypatch):
    """The words that bash is offered for the last word of `line`."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    given = {"_QKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return CliRunner().invoke(application, [], prog_name="qkit", env=given).output.split()


@pytest.mark.parametrize(
    ("line", "word", "not_offered"),
    [
        ("qkit quantize model out --recipe int4-g1", "int4-g128", "int8-row"),
        ("qkit train model out --recipe mxfp", "mxfp4-a16", "int4-g32"),
        ("qkit plan model -r W4A16", "W4A16_ASYM", "W8A16"),
        ("qkit recipes nv", "nvfp4-a16", "mxfp4"),
        ("qkit parity int8-g64 fp", "fp8", "int4-g32"),
        ("qkit eval model --backend torch", "torchao", "numpy"),
        ("qkit quantize model out --backend n", "numpy", "torchao"),
    ],
)
def test_recipes_and_engines_complete(line, word, not_offered, monkeypatch):
    words = offered(line, monkeypatch)
    assert word in words
    assert not_offered not in words


def test_every_option_for_a_recipe_or_an_engine_completes(monkeypatch):
    seen = 0
    for name, command in get_command(application).commands.items():
        for one in command.params:
            for flag, word in (("--recipe", "int4-g32"), ("--backend", "torchao")):
                if flag in one.opts:
                    assert word in offered(f"qkit {name} {flag} {word[:3]}", monkeypatch), (name, flag)
                    seen += 1
    assert seen >= 15


def test_a_file_of_ones_own_is_offered_beside_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("int4-mine.toml", "mine.toml", "notes.txt"):
        (tmp_path / file).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.toml").touch()
    assert "int4-mine.toml" in recipe_names("int4-")
    assert recipe_names("mi") == ["mine.toml"]
    assert recipe_names("more/") == ["more/other.toml"]
    assert recipe_names("nowhere/") == recipe_names("notes") == []


def test_no_word_is_in_the_way_of_a_path(monkeypatch):
    for line in ("qkit quantize mod", "qkit export ", "qkit eval mod other", "qkit train model out --data te"):
        assert offered(line, monkeypatch) == [], line


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_itself_completes_a_recipe_and_a_path(tmp_path):
    """A terminal with bash, where someone types and presses the tab key."""
    (tmp_path / "model-of-mine").mkdir()
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "PS1": "> ", "TERM": "dumb"}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    outer, inner = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=inner, stdout=inner, stderr=inner, cwd=tmp_path, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        os.write(
            outer, b"bind 'set enable-bracketed-paste off'; eval \"$(qkit --show-completion bash)\"; echo rea''dy\n"
        )
        until(outer, "ready")
        os.write(outer, b"qkit quantize mod\t")
        until(outer, "model-of-mine/")
        os.write(outer, b" out --recipe int8-ro\t")
        until(outer, "int8-row ")
    finally:
        shell.kill()
        shell.wait()
        os.close(outer)
        os.close(inner)


def until(terminal, words, *, seconds=60):
    """Reads a terminal until it shows `words`."""
    shown, end = "", time.monotonic() + seconds
    while words not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\a", "", os.read(terminal, 4096).decode(errors="replace"))
