"""Plugins installed for real: a complete backend, and one that breaks and disables only itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both plugins installed, to be put on PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", target, PLUGINS / "toy", PLUGINS / "broken"], check=True)
    return target


def run(installed: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=installed, check=False)


def test_the_toy_is_ready_and_the_broken_plugin_says_why_not(installed: Path) -> None:
    done = run(installed, "-c", "from qkit.cli import main; main()", "backends", "--json")
    assert done.returncode == 0, done.stderr
    status = {row["name"]: row for row in json.loads(done.stdout)}
    assert status["toy"]["ready"]
    assert status["numpy"]["ready"]
    assert not status["broken"]["ready"]
    assert status["broken"]["reason"] == "plugin disabled: RuntimeError: its licence server is on fire"


def test_a_broken_plugin_disables_only_itself(installed: Path) -> None:
    code = """
import numpy, qkit
from toyframe import Tensor
grid = qkit.Grid("int4", 4)
q = qkit.quantize(Tensor(numpy.array([[-8, 7, 3.5, 0.5]], numpy.float32)), grid)
assert isinstance(q.codes, Tensor) and q.codes.array.tolist() == [[-8, 7, 4, 0]]
assert "int4-g64" in qkit.recipes()
try:
    qkit.backend("broken")
except qkit.BackendError as error:
    assert "is disabled: RuntimeError: its licence server is on fire" in str(error)
else:
    raise AssertionError
"""
    done = run(installed, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_toy_passes_the_conformance_suite(installed: Path) -> None:
    suite = PLUGINS / "toy" / "tests" / "test_toy.py"
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    done = run(installed, "-m", "pytest", *options, "--rootdir", installed, suite)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_the_toy_is_a_backend_under_a_hundred_lines_of_code() -> None:
    lines = (PLUGINS / "toy" / "qkit_toy" / "backend.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 100
