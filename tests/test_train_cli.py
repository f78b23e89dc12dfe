"""`qkit train`: options, run files, what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest
from training import ENGINES, folder

from qkit.checkpoint import swap
from qkit.training.folder import beside

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")
SHORT = (
    "--steps",
    "4",
    "--batch",
    "2",
    "--length",
    "16",
    "--learning-rate",
    "1e-3",
    "--backend",
    ENGINES[0] if ENGINES else "",
)


def qkit(*arguments, cwd):
    command = [sys.executable, "-c", "from qkit.cli import main; main()", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, cwd=cwd)


def test_a_run_by_options(tmp_path):
    path = folder(tmp_path)
    done = qkit("model", "out", "-r", "int4-g32", "--data", "*.txt", *SHORT, "--set", "betas=[0.9,0.95]", cwd=path)
    assert done.returncode == 0, done.stderr
    assert f"4 steps on {ENGINES[0]} from the beginning, tokens by bytes" in done.stderr
    assert "step 4: held-out loss" in done.stderr
    assert "held-out loss of the artifact, opened again" in done.stdout
    assert (path / "out" / "model.safetensors").exists()
    pytest.importorskip("matplotlib")
    assert (path / "out.run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = qkit("model", "out", "-r", "int4-g32", "--data", "*.txt", *SHORT, cwd=path)
    assert (again.returncode, again.stdout) == (3, "")
    assert "out holds a model already" in again.stderr


def test_a_run_file_and_options_over_it_as_json_lines(tmp_path):
    path = folder(tmp_path)
    (path / "run.toml").write_text(
        f"""
model = "model"
out = "out"
data = "text.txt"
recipe = "int4-g32"
backend = "{ENGINES[0]}"
steps = 3
batch = 2
length = 16
[quantization]
start = 2
"""
    )
    done = qkit("run.toml", "--steps", "5", "--set", "quantization.match=*.mlp.*", "--warmup", "2", "--json", cwd=path)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        "start",
        "evaluation",
        *["step"] * 5,
        "evaluation",
        "checkpoint",
        "end",
    ]
    run = events[0]["run"]
    assert (run["steps"], run["warmup"], run["batch"]) == (5, 2, 2)
    assert run["quantization"] == {"start": 2, "windows": [], "match": "*.mlp.*", "interval": 1, "ramp": []}
    assert [e["learning_rate"] for e in events if e["event"] == "step"][:2] == [5e-6, 1e-5]
    assert events[-1]["held_out_saved"] == pytest.approx(events[-1]["held_out_after"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("model", "out"), 3, "data is missing"),
        (("model", "out", "--data", "none.txt"), 3, "'none.txt' stands for no file"),
        (("model", "out", "--data", "text.txt", "--set", "lerning_rate=1"), 3, "did you mean learning_rate?"),
        (("model", "out", "--data", "text.txt", "--set", "oops"), 2, "want KEY=VALUE"),
        (("none.toml",), 3, "none.toml: "),
    ],
)
def test_a_failure_is_one_line_and_a_code(tmp_path, arguments, code, message):
    path = folder(tmp_path)
    done = qkit(*arguments, "--recipe", "int4-g32", cwd=path)
    assert done.returncode == code
    assert message in done.stderr
    assert not (path / "out.run").exists()


def test_a_second_run_in_one_folder_exits_with_4(tmp_path):
    path = folder(tmp_path)
    beside(path / "out").mkdir()
    held = swap.lock(beside(path / "out") / "lock")
    done = qkit("model", "out", "-r", "int4-g32", "--data", "*.txt", *SHORT, cwd=path)
    os.close(held)
    assert done.returncode == 4
    assert "held by another process" in done.stderr
