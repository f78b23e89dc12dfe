"""The The paths to vLLM's and mlx-lm's answers, command by command; that to llama.cpp's is in `test_llama_cpp`."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qkit.cli.application import application

sys.path.insert(0, str(Path(__file__).parent))
import run as readers

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text()
COMMANDS = re.findall(r"^\$ (.+?)\s*(?:#.*)?$", PAGE.partition("\n## ")[0], re.MULTILINE)
pytestmark = pytest.mark.readers


def run(*names):
    """Runs the README's qkit commands that write one of `names`, as they stand."""
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "qkit" and words[3] in names:
            done = CliRunner().invoke(application, words[1:])
            assert done.exit_code == 0, done.output


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "HOME", readers.HOME.absolute())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(readers.HOME / "models" / "llama")
    return tmp_path


def test_vllms_server_answers_a_chat_request(place):
    assert "vllm serve served/" in COMMANDS
    run("served/")
    row = {"name": "served", "folder": str(place / "served"), "options": {"serve": True, "dtype": "bfloat16"}}
    (answer,) = readers.ask("vllm", "read_vllm.py", "llama", [row])
    assert answer.get("text"), json.dumps(answer)


def test_transformers_generates_from_the_same_directory(place):
    run("served/")
    row = {"name": "served", "folder": str(place / "served")}
    (answer,) = readers.ask("transformers", "read_transformers.py", "llama", [row])
    assert answer.get("text"), json.dumps(answer)


def test_mlx_lm_generates(place):
    assert any(command.startswith("mlx_lm.generate --model mlx-served") for command in COMMANDS)
    run("served/", "mlx-served/")
    (answer,) = readers.ask("mlx-lm", "read_mlx_lm.py", "llama", [{"name": "mlx", "folder": str(place / "mlx-served")}])
    assert answer.get("text"), json.dumps(answer)
