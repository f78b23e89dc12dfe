"""Bad input of fits through the command line: an exit code, one line that names the thing, and no output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import run_qkit
from models import make
from safetensors.numpy import load_file, save_file

import qkit
from qkit.engines.abilities import offers
from qkit.engines.blocks import Watches
from qkit.fitting.statistics import open_statistics

ENGINES = [name for name in ("torchao", "mlx") if offers(qkit.backend(name), Watches)]
INPUT, MACHINE = 3, 5
TEXT = "".join(f"{number} squared is {number * number}; " for number in range(2000))
RECIPES = ("int3-g32", "int4-g32-minmax", "mxfp4-a16", "nvfp4-a16", "int8-row")
pytestmark = pytest.mark.filterwarnings("default::qkit.errors.FewTokensWarning")
NORM = "model.layers.1.post_attention_layernorm.weight"  #: of the inputs of gate and up


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, a text, and statistics."""
    home = tmp_path_factory.mktemp("home")
    make(home / "model", "llama")
    (home / "text.txt").write_text(TEXT)
    assert calibrate(home, home / "model", home / "stats")[0] == 0
    return home


def calibrate(home: Path, model: Path, out: Path, *more: Any, length: int = 64) -> tuple[int, str]:
    return qkit_(["calibrate", model, out, "--data", home / "text.txt", "--length", length, *more])


def quantize(model: Path, out: Path, recipe: str, *more: Any) -> tuple[int, str]:
    return qkit_(["quantize", model, out, "-r", recipe, *more])


def qkit_(words: list[Any]) -> tuple[int, str]:
    code, said = run_qkit([str(word) for word in words])
    return code, " ".join(said.split())


def changed(home: Path, out: Path, **tensors: Any) -> Path:
    """The model with functions applied to some of its tensors."""
    make(out, "llama")
    found = load_file(out / "model.safetensors")
    save_file(found | {name: change(found[name].copy()) for name, change in tensors.items()}, out / "model.safetensors")
    return out


def zeroed(*columns: int) -> Any:
    def change(array: Any) -> Any:
        array[list(columns)] = 0
        return array

    return change


def test_statistics_of_another_model(home: Path, tmp_path: Path) -> None:
    other = changed(home, tmp_path / "other", **{"model.layers.0.mlp.up_proj.weight": lambda w: w + np.float32(1e-3)})
    for method in ("search", "solve"):
        code, said = quantize(other, tmp_path / "out", "int4-g32", "--fit", method, "--stats", home / "stats")
        assert code == INPUT
        assert f"has statistics of another model than {other}: run qkit calibrate {other} for its own" in said
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_statistics(home: Path, tmp_path: Path) -> None:
    for file in (home / "stats").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "block-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4] + b"\0\0\0@")
    code, said = quantize(home / "model", tmp_path / "out", "int4-g32", "--fit", "solve", "--stats", tmp_path)
    assert (code, "block-00001.safetensors is not the file that qkit calibrate wrote" in said) == (INPUT, True)
    code, said = quantize(home / "model", tmp_path / "out", "int4-g32", "--fit", "solve", "--stats", tmp_path / "no")
    assert (code, "name a directory that qkit calibrate has written" in said) == (INPUT, True)
    code, said = quantize(home / "model", tmp_path / "out", "int4-g32", "--fit", "solve")
    assert (code, "solve needs statistics of the model: run qkit calibrate first" in said) == (MACHINE, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENGINES)
def test_too_few_tokens(name: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:100])
    code, said = calibrate(tmp_path, home / "model", tmp_path / "stats", "--backend", name, length=50)
    assert code == INPUT
    assert "100 tokens are too few for blocks of 128 inputs: give more text, or more windows, of at least 2,560" in said
    assert not (tmp_path / "stats").exists()
    (tmp_path / "text.txt").write_text(TEXT[:200])
    code, said = calibrate(tmp_path, home / "model", tmp_path / "stats", "--backend", name, length=50)
    assert code == 0
    assert "200 tokens are few for blocks of 128 inputs: from 2,560 on, more change little" in said
    for recipe in (
        RECIPES if name == ENGINES[0] else ()
    ):  # 200 tokens for 256 inputs of down_proj: its moments are of no full rank
        moments = open_statistics(tmp_path / "stats").moments("model.layers.0.mlp.down_proj")
        assert np.linalg.matrix_rank(moments.astype(np.float64), tol=1e-5 * np.abs(moments).max()) < len(moments)
        assert (
            quantize(home / "model", tmp_path / recipe, recipe, "--fit", "solve", "--stats", tmp_path / "stats")[0] == 0
        )
        assert qkit_(["verify", tmp_path / recipe])[0] == 0


@pytest.mark.parametrize("name", ENGINES)
def test_dead_columns(name: str, home: Path, tmp_path: Path) -> None:
    columns = (3, 70, *range(32, 64))  # two, and a group
    model = changed(home, tmp_path / "model", **{NORM: zeroed(*columns)})
    assert calibrate(home, model, tmp_path / "stats", "--backend", name)[0] == 0
    known = open_statistics(tmp_path / "stats").moments("model.layers.1.mlp.gate_proj")
    assert set(columns) <= set(np.flatnonzero(known.diagonal() == 0))  # others of this model have norms of zero
    for method in ("search", "solve"):
        for recipe in RECIPES if name == ENGINES[0] else RECIPES[:1]:
            out = tmp_path / f"{recipe}-{method}"
            assert quantize(model, out, recipe, "--fit", method, "--stats", tmp_path / "stats")[0] == 0
            loaded = qkit.load(out, backend="torchao")
            assert np.isfinite(qkit.backend("torchao").logits(loaded, np.arange(8)[None])).all()


@pytest.mark.parametrize("name", ENGINES)
def test_inputs_that_are_always_zero(name: str, home: Path, tmp_path: Path) -> None:
    model = changed(home, tmp_path / "model", **{NORM: np.zeros_like})
    assert calibrate(home, model, tmp_path / "stats", "--backend", name)[0] == 0
    code, said = quantize(model, tmp_path / "out", "int4-g32", "--fit", "solve", "--stats", tmp_path / "stats")
    assert code == INPUT
    assert "model.layers.1.mlp" in said
    assert "moments are zero everywhere: no token has reached the layer" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_inputs_that_are_not_numbers(name: str, value: float, home: Path, tmp_path: Path) -> None:
    def spoil(norm: Any) -> Any:
        norm[5] = value
        return norm

    model = changed(home, tmp_path / "model", **{NORM: spoil})
    code, said = calibrate(home, model, tmp_path / "stats", "--backend", name)
    assert code == INPUT
    assert "model.layers.1.mlp.gate_proj: its inputs hold NaN or infinity" in said
    assert not (tmp_path / "stats").exists()


def test_a_grid_whose_scales_another_program_chose(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "stored.toml"
    recipe.write_text(
        'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 32\nscale = "stored"\n[[rules]]\nmatch = "*"\nweight = "w"\n'
    )
    for more in (("--fit", "search"), ("--fit", "solve", "--stats", home / "stats")):
        code, said = quantize(home / "model", tmp_path / "out", str(recipe), *more)
        assert code == INPUT
        assert "stored" in said
    assert not (tmp_path / "out").exists()


def test_a_budget_below_the_least_possible(home: Path, tmp_path: Path) -> None:
    words = ["plan", home / "model", "--grids", "int2-g32,int4-g32", "--data", home / "text.txt", "--length", 64]
    code, said = qkit_([*words, "--budget", "2.4bpw", "--windows", 8])
    assert code == MACHINE
    assert "2.4 bits per weight is below the least possible, which is 2.5000" in said
    code, said = qkit_([*words, "--budget", "10kB", "--windows", 8])
    assert code == MACHINE
    assert "below the least possible, which is" in said


@pytest.mark.size  # `test_calibrate` kills runs at every place; these go through the command
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("more", [(), ("--drift", "-r", "int3-g32")], ids=["plain", "drift"])
def test_a_killed_run_ends_with_the_same_bytes(name: str, more: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    words = ["calibrate", home / "model", "--data", home / "text.txt", "--length", 64, "--backend", name, *more]
    start = "import sys; sys.argv[0] = 'qkit'; from qkit.cli import main; main()"
    command = [sys.executable, "-c", start, *map(str, (words[0], words[1], tmp_path / "stats", *words[2:]))]
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    first = tmp_path / "stats.part" / "block-00000.safetensors"
    while not first.exists() and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (tmp_path / "stats").exists()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    whole = [sys.executable, "-c", start, *map(str, (words[0], words[1], tmp_path / "whole", *words[2:]))]
    subprocess.run(whole, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "stats").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert json.loads(files["statistics.json"])["tokens"] > 0
