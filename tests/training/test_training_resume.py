"""Runs that are killed, resumed, carried to another engine, refused, or end badly."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from alike import contents as files
from models import small
from runs import Stopped, codes_of, folder, last, learning, losses, same_run, stopping, table
from safetensors.numpy import load_file
from tables import TRAINERS as ENGINES

import qkit
from qkit.cli import boundary
from qkit.cli.application import application
from qkit.reference import learned
from qkit.startup import INTERRUPTED
from qkit.storage import swap
from qkit.training import checkpoint, curve, finish, run_from_table, train_model
from qkit.training import folder as run_folder
from qkit.training.folder import LOG, read_log, run_folder_of

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")
SCRIPT = "import sys, json; from qkit.training import *; train_model(run_from_table(json.loads(sys.argv[1])))"
BOUND = 1e-5  #: nats that losses of two engines may differ by within 24 steps; measured: 9.5e-7


def train(path, **changes):
    return train_model(run_from_table(table(path, **changes)))


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path, name):
    path = folder(tmp_path)
    run = {
        "backend": name,
        "recipe": "int8-average-act-int8-weight",
        "steps": 120,
        "checkpoint_every": 3,
        "compile": False,
    }
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(table(path, **run))])
    killed = run_folder_of(path / "out")
    while len(list(killed.glob(checkpoint.PATTERN)) if killed.exists() else ()) < 2:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (path / "out").exists()
    assert 0 < checkpoint.newest(killed).step < 80
    train(path, **run)
    train(path, **run, out=str(path / "whole"))
    assert same_run(path / "out", path / "whole")


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_is_resumed_is_the_uninterrupted_one(tmp_path, name):
    run = {"backend": name, "recipe": "int8-average-act-int8-weight", "accumulation": 2, "weight_decay": 0.01}
    path = folder(tmp_path)
    train(path, **run, out=str(path / "whole"))
    with stopping(5) as tell:
        train_model(run_from_table(table(path, **run)), tell=tell)
    train(path, **run)
    assert same_run(path / "out", path / "whole")
    kinds = [event["event"] for event in read_log(run_folder_of(path / "out") / LOG)]
    assert kinds.count("resume") == 1


SCHEDULED = {"recipe": "int4-g32", "quantization": {"interval": 3, "ramp": [[5, "int8-g32"]]}, "checkpoint_every": 6}


LEARNED = [("int3", "signed"), ("int2", "minmax"), ("e2m1", "rceil")]


@pytest.mark.parametrize("changes", [SCHEDULED, *LEARNED], ids=["scheduled", "scales", "zero points", "exponents"])
@pytest.mark.parametrize("name", ENGINES)
def test_schedules_and_learned_ranges_are_resumed(tmp_path, name, changes):
    """Stopped at step 6, which ends on a refresh and on the second recipe."""
    path = folder(tmp_path)
    if isinstance(changes, tuple):
        changes = {"recipe": learning(path, *changes), "checkpoint_every": 6, "offset_learning_rate": 0.2}
    run = {"backend": name, "learning_rate": 1e-2, **changes}
    train(path, **run, out=str(path / "whole"))
    with stopping(6) as tell:
        train_model(run_from_table(table(path, **run)), tell=tell)
    train(path, **run)
    assert same_run(path / "out", path / "whole")


@pytest.mark.parametrize(
    ("grid", "parameter", "rate"), [(LEARNED[1], "weight_zero", 1e-3), (LEARNED[2], "weight_offset", 1e-5)]
)
@pytest.mark.parametrize("name", ENGINES)
def test_zero_points_and_exponents_change_codes_in_a_short_run(tmp_path, name, grid, parameter, rate):
    """A zero point has a gradient where values are clipped, so that scales have to move first. Against those it began with."""
    path = folder(tmp_path)
    run = {"backend": name, "recipe": learning(path, *grid), "steps": 60, "learning_rate": rate}
    train(path, **run, offset_learning_rate=0, out=str(path / "still"))
    train(path, **run)
    first, state = load_file(last(path / "still")), load_file(last(path / "out"))
    places = [key for key in state if key.startswith("weights.") and key.endswith(parameter)]
    assert len(places) == 14
    changed, packed = 0, codes_of(path / "out")
    for key in places:
        layer, law = key.rpartition(".")[0], qkit.Grid(grid[0], 32, grid[1])
        ranges = {one: state[f"{layer}.{one}"] for one in learned.names(law)}
        codes, others = (
            learned.quantize(state[f"{layer}.weight"], law, {**ranges, parameter: it[key]}).codes
            for it in (state, first)
        )
        assert (codes == packed[layer.removeprefix("weights.")]).all()
        changed += int((codes != others).sum())
    assert changed > 0


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs two engines")
@pytest.mark.parametrize(("first", "second"), [ENGINES[:2], ENGINES[:2][::-1]])
def test_a_run_begun_on_one_engine_is_finished_on_the_other(tmp_path, first, second):
    """Against the run on the first alone: losses within BOUND, codes equal but for 1 in 1000."""
    run = {"steps": 24, "checkpoint_every": 12, "learning_rate": 1e-4, "evaluate_every": 12}
    path = folder(tmp_path)
    train(path, **run, backend=first, out=str(path / "whole"))
    with stopping(12) as tell:
        train_model(run_from_table(table(path, **run, backend=first)), tell=tell)
    train(path, **run, backend=second)
    apart = np.abs(np.array(losses(path / "out")) - losses(path / "whole"))
    print("largest difference of a loss", apart.max())
    assert (apart[:12] == 0).all()
    assert apart.max() < BOUND
    codes = [codes_of(path / out) for out in ("out", "whole")]
    equal = sum(int((codes[0][key] == codes[1][key]).sum()) for key in codes[0])
    total = sum(array.size for array in codes[0].values())
    print("codes equal", equal, "of", total)
    assert equal >= 0.999 * total


def interrupted(path, **changes):
    with stopping(5) as tell:
        train_model(run_from_table(table(path, **changes)), tell=tell)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "int3-g32"}, r"is of the recipe 'int4-g32', and this run is for 'int3-g32': repeat that run"),
        ({"recipe": "float"}, r"is of the recipe 'int4-g32', and this run is for 'float'"),
        ({"model": "other"}, r"is of the model .*model, and .*other is another now"),
        ({"data": "other"}, r"is of another text than .*other\.txt"),
        ({"length": 8}, r"is of another text than"),
        ({"steps": 13}, r"is of a run with steps = 12, and now it is 13"),
        ({"learning_rate": 0.5}, r"is of a run with learning_rate = 0\.001, and now it is 0\.5"),
        ({"quantization": {"start": 4}}, r"is of a run with quantization = .*'start': 1.* and now it is .*'start': 4"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_a_resume_of_another_run_is_refused_and_both_are_named(tmp_path, changes, message, name):
    path = folder(tmp_path)
    interrupted(path, backend=name)
    before = files(run_folder_of(path / "out"))
    if changes.get("model") == "other":
        (path / "second").mkdir()
        folder(path / "second", intermediate_size=96)
        shutil.copytree(path / "second" / "model", path / "other")
        changes = {"model": str(path / "other")}
    if changes.get("data") == "other":
        (path / "other.txt").write_text("other " * 500)
        changes = {"data": [str(path / "other.txt")]}
    with pytest.raises(qkit.RunError, match=message):
        train(path, **{"backend": name, **changes})
    assert files(run_folder_of(path / "out")) == before


def test_rules_that_changed_under_one_name_are_another_recipe(tmp_path):
    path, mine = folder(tmp_path), tmp_path / "mine.toml"
    text = 'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 32\n[[rules]]\nmatch = "*"\nweight = "w"\n'
    mine.write_text(text)
    interrupted(path, recipe=str(mine))
    mine.write_text(text.replace("int4", "int3"))
    with pytest.raises(qkit.RunError, match=r"recipe 'mine', and this run is for 'mine', whose rules are others now"):
        train(path, recipe=str(mine))


def test_what_does_not_change_the_training_may_change(tmp_path):
    path = folder(tmp_path)
    interrupted(path)
    shutil.move(path / "model", path / "moved")
    train(path, model=str(path / "moved"), checkpoint_every=4, evaluate_every=3)
    assert len(losses(path / "out")) == 12


@pytest.mark.parametrize("name", ENGINES)
def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_last_good_checkpoint(tmp_path, name):
    path = folder(tmp_path)
    with pytest.raises(qkit.DivergedError, match=r"at step \d+: lower .*; the last good checkpoint is .*0001\.safe"):
        train(path, backend=name, learning_rate=1e38, checkpoint_every=1, schedule="constant", warmup=0.99)
    kept = load_file(last(path / "out"))
    assert all(np.isfinite(kept[key]).all() for key in kept if key.startswith("weights."))


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path):
    state = {"steps": np.array(3), "weights.a": np.array([1.0, np.nan], np.float32)}
    with pytest.raises(qkit.DivergedError, match=r"weights\.a is not finite after step 3"):
        checkpoint.write(tmp_path, state, about={})
    assert list(tmp_path.iterdir()) == []
    ranges = {"steps": np.array(3), "weights.input_range": np.array([np.inf, -np.inf], np.float32)}
    assert checkpoint.write(tmp_path, ranges, about={}).exists()


def state(step, size=64):
    return {"steps": np.array(step), "weights.a": np.full(size, step, np.float32)}


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 20, 3000):
        checkpoint.write(tmp_path, state(step), about={"x": 1})
    assert [int(load_file(f)["steps"]) for f in sorted(tmp_path.iterdir())] == [20, 3000]
    found = checkpoint.newest(tmp_path)
    assert (found.step, found.about) == (3000, {"x": 1})


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename"])
def test_a_failing_write_leaves_the_last_checkpoint(tmp_path, monkeypatch, call):
    checkpoint.write(tmp_path, state(1), about={})
    before = files(tmp_path)

    def failing(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(tmp_path, state(2), about={})
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith(".")} == before
    checkpoint.write(tmp_path, state(2), about={})
    assert checkpoint.newest(tmp_path).step == 2


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(full_disk):
    checkpoint.write(full_disk, state(1, 100_000), about={})
    checkpoint.write(full_disk, state(2, 100_000), about={})
    before = files(full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(full_disk, state(3, 100_000), about={})
    assert files(full_disk) == before
    assert checkpoint.newest(full_disk).step == 2


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_whose_disk_is_full_goes_on_from_its_last_checkpoint_once_there_is_room(tmp_path, full_disk, name):
    """Three checkpoints of 0.4 MB are one too many."""
    path = folder(tmp_path)
    out = full_disk / "out"
    with pytest.raises(OSError, match=r"No space left .*checkpoint-00000012"):
        train(path, backend=name, out=str(out))
    assert checkpoint.newest(run_folder_of(out)).step == 10
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(full_disk)], check=True)
    train(path, backend=name, out=str(out))
    train(path, backend=name, out=str(path / "whole"))
    assert same_run(out, path / "whole")


DAMAGES = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "another header": lambda data: data[:8] + b"?" + data[9:],
    "another program's": lambda data: data.replace(b"qkit_run", b"some_run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_with_the_one_before(tmp_path, damage):
    before, file = (checkpoint.write(tmp_path, state(step), about={}) for step in (1, 2))
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(
        qkit.ArtifactError, match=rf"{file.name}.*[;:] remove it to go on from {before.name}, the one before"
    ):
        checkpoint.newest(tmp_path)
    file.unlink()  # the way out
    assert checkpoint.newest(tmp_path).step == 1
    before.write_bytes(DAMAGES[damage](before.read_bytes()))
    with pytest.raises(qkit.ArtifactError, match=rf"{before.name}.*remove it to begin anew: there is none before"):
        checkpoint.newest(tmp_path)


#: What comes after the last step, in order: an object, and the name of a function of it.
ENDING = {
    "the conversion": (finish.pipeline, "convert"),
    "saving": (finish, "save"),
    "opening the artifact again": (finish, "load"),
    "the picture": (curve, "draw_log"),
    "the end of the log": (run_folder.Log, "add"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ENDING)
def test_a_run_that_is_killed_after_its_last_step_goes_on_by_the_same_command(tmp_path, monkeypatch, step, after):
    """Stopped before or after each thing that is left to do; the picture is the last but one."""
    pytest.importorskip("matplotlib")
    path = folder(tmp_path)
    owner, name = ENDING[step]
    real = getattr(owner, name)

    def killed(*arguments, **options):
        if name == "add" and arguments[1]["event"] != "end":
            return real(*arguments, **options)
        if after:
            real(*arguments, **options)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Stopped):
            by_command(path, "out")
    ended = step == "the end of the log" and after
    if not ended:
        by_command(path, "out")
    by_command(path, "whole")
    assert same_run(path / "out", path / "whole")
    left = [{entry.name for entry in run_folder_of(path / out).iterdir()} for out in ("out", "whole")]
    assert left[0] == left[1] > {"loss.png", LOG}
    assert read_log(run_folder_of(path / "out") / LOG)[-1]["event"] == "end"
    with pytest.raises(qkit.ArtifactError, match="holds a model already"):
        by_command(path, "out")


def test_ctrl_c_writes_a_checkpoint_after_the_step_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    path = folder(tmp_path)
    add = run_folder.Log.add

    def press(log, event):
        add(log, event)
        if event["event"] == "step" and event["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Log, "add", press)
        with pytest.raises(SystemExit) as ended:
            boundary.run(lambda: by_command(path, "out", standalone_mode=True))
    assert ended.value.code == INTERRUPTED
    assert "the same command goes on from here" in capsys.readouterr().err
    assert checkpoint.newest(run_folder_of(path / "out")).step == 1
    by_command(path, "out")
    by_command(path, "whole")
    assert same_run(path / "out", path / "whole")


def by_command(path, out, *, standalone_mode=False):
    what = ("--data", str(path / "text.txt"), "-r", "int4-g32", "--backend", ENGINES[0])
    small = ("--steps", "2", "--batch", "2", "--length", "16")
    application(["train", str(path / "model"), str(path / out), *what, *small], standalone_mode=standalone_mode)


def test_a_run_that_was_killed_at_its_end_replaces_no_other_model(tmp_path, monkeypatch):
    path = folder(tmp_path)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "load", killed)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    shutil.rmtree(path / "out")
    qkit.save(small(ENGINES[0]), path / "out")
    before = files(path / "out")
    with pytest.raises(qkit.ArtifactError, match="out holds a model already"):
        train(path)
    assert files(path / "out") == before
    assert not (run_folder_of(path / "out") / "again").exists()


@pytest.mark.parametrize("name", ENGINES)
def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch, name):
    path = folder(tmp_path)
    monkeypatch.setattr(swap, "PATIENCE", 0.1)

    def second(event):
        if event["step"] == 3:
            with pytest.raises(qkit.LockedError, match=r"out\.run.*held by another process"):
                train(path, backend=name)

    train_model(run_from_table(table(path, backend=name)), tell=second)
    assert not (run_folder_of(path / "out") / "lock").exists()
