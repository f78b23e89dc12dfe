"""`qkit train`: options, run files, what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest
from models import small
from runs import folder
from safetensors.numpy import load_file
from tables import TRAINERS as ENGINES

import qkit as api
from qkit.storage import swap
from qkit.training.folder import run_folder_of

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
    return run("train", *arguments, cwd=cwd)


def run(*arguments, cwd):
    command = [sys.executable, "-c", "from qkit.cli import main; main()", *map(str, arguments)]
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


@pytest.mark.parametrize("name", ENGINES)
def test_a_teacher_writes_its_logits_once_and_students_of_any_engine_learn_from_them(tmp_path, name):
    """All 256 of them, so that a student that learns from the teacher itself has the same losses."""
    path, other = folder(tmp_path), ENGINES[::-1][ENGINES.index(name)]
    api.save(small(name, rms_norm_eps=0.5), path / "teacher", backend=name)
    more = ("--length", "16", "--backend", name)
    done = run("teach", "teacher", "top.safetensors", "--data", "*.txt", "--top", "256", *more, cwd=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "top.safetensors: the 256 largest logits at every position, for sequences of 16" in done.stdout
    losses = {}
    for teacher, engine in (("top.safetensors", other), ("teacher", name), (None, name)):
        told = ("--set", f"distillation.teacher={teacher}") if teacher else ()
        out = ("model", f"out-{teacher}", "-r", "int4-g32", "--data", "*.txt", *SHORT[:-1], engine)
        done = qkit(*out, *told, "--json", cwd=path)
        assert done.returncode == 0, done.stderr
        losses[teacher] = [e["loss"] for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "step"]
    assert losses["top.safetensors"] == pytest.approx(losses["teacher"], rel=1e-4)  # another engine's products
    assert losses["teacher"] != pytest.approx(losses[None], rel=1e-2)


def test_a_run_file_says_who_teaches_and_a_few_logits_are_few_bytes(tmp_path):
    path = folder(tmp_path)
    (path / "run.toml").write_text(
        'model = "model"\nout = "out"\ndata = "text.txt"\nlength = 16\n[distillation]\nteacher = "model"\n'
    )
    done = run("teach", "run.toml", "few.safetensors", "--top", "3", "--backend", ENGINES[0], cwd=path)
    assert done.returncode == 0, done.stderr
    few = load_file(path / "few.safetensors")
    assert few["logits"].shape == few["tokens"].shape == (*few["logits"].shape[:2], 3)
    assert (few["logits"][..., :-1] >= few["logits"][..., 1:]).all()
    done = qkit(
        "run.toml", *SHORT, "-r", "int8-g32", "--set", "distillation.teacher=few.safetensors", "--json", cwd=path
    )
    assert done.returncode == 0, done.stderr
    first = next(e["loss"] for e in map(json.loads, done.stdout.splitlines()) if e["event"] == "step")
    assert first < 1e-3  # the student is the teacher, in 8 bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "text.txt", "--top", "300"), "top is 300: the teacher has 256 logits"),
        (("--data", "none.txt"), "'none.txt' stands for no file"),
        ((), "data is missing"),
        (("--data", "text.txt", "--backend", "numpy"), "'numpy' cannot train"),
        (("--data", "text.txt", "--length", "9999"), "length is 9999, and the model has positions for 128"),
    ],
)
def test_teaching_is_refused_by_name_and_leaves_nothing(tmp_path, arguments, message):
    path = folder(tmp_path)
    done = run("teach", "model", "top.safetensors", "--length", "16", *arguments, cwd=path)
    assert (done.returncode, done.stdout) == (3, "")
    assert message in done.stderr
    assert {entry.name for entry in path.iterdir()} == {"model", "text.txt"}


def test_a_file_of_logits_is_never_overwritten(tmp_path):
    path = folder(tmp_path)
    (path / "top.safetensors").write_text("mine")
    done = run("teach", "model", "top.safetensors", "--data", "text.txt", "--length", "16", cwd=path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "top.safetensors is there already: remove it, or choose another name" in done.stderr
    assert (path / "top.safetensors").read_text() == "mine"


def test_a_second_run_in_one_folder_exits_with_4(tmp_path):
    path = folder(tmp_path)
    run_folder_of(path / "out").mkdir()
    held = swap.lock(run_folder_of(path / "out") / "lock")
    done = qkit("model", "out", "-r", "int4-g32", "--data", "*.txt", *SHORT, cwd=path)
    os.close(held)
    assert done.returncode == 4
    assert "held by another process" in done.stderr
