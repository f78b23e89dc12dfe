"""One output in parts: the bytes of a single run, and every other set of parts is refused by name."""

import os
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest
from alike import contents
from checkpoints import killed_at, tensors, whole
from safetensors.numpy import save_file

import qkit
from qkit.storage import parts
from qkit.storage.parts import Part
from qkit.streaming.carry_out import join_parts, quantize_directory
from qkit.streaming.plan import make_plan

SHARD = 6000  #: bytes: six weights files


@pytest.fixture
def source(tmp_path):
    return whole(tmp_path / "in")


def plan(source, recipe="int4-g64", shard_bytes=SHARD):
    return make_plan(source, qkit.recipe(recipe), shard_bytes=shard_bytes)


def write(made, out, part=None):
    part = part and Part(*part)
    quantize_directory(made, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None, part=part)


def write_in_parts(made, out, count=2):
    for number in range(1, count + 1):
        write(made, out, (number, count))
    join_parts(made, out)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_parts_give_the_bytes_of_a_single_run(source, tmp_path, count):
    write(plan(source), tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 6
    for number in reversed(range(1, count + 1)):
        write(plan(source), tmp_path / "out", (number, count))
        assert not (tmp_path / "out").exists()
    join_parts(plan(source), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "one", "out"]


def test_a_row_whose_tensors_lie_in_two_files_is_written_by_both(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    save_file(
        {"a.weight": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)},
        source / "model.safetensors",
    )
    made = plan(source, shard_bytes=2100)
    assert len(made.layout.headers) == 2
    write(made, tmp_path / "one")
    for number in (1, 2):
        write(plan(source, shard_bytes=2100), tmp_path / "out", (number, 2))
    join_parts(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_missing_parts_are_named(source, tmp_path):
    with pytest.raises(qkit.PlanError, match="out has no finished parts beside it: write them with --part I/N"):
        join_parts(plan(source), tmp_path / "out")
    write(plan(source), tmp_path / "out", (2, 4))
    with pytest.raises(
        qkit.PlanError, match=r"part 1/4, 3/4, 4/4 of .*out is missing, or not finished: run --part 1/4"
    ):
        join_parts(plan(source), tmp_path / "out")
    assert (tmp_path / ".out.part-2-of-4").is_dir()
    assert not (tmp_path / "out").exists()


def test_parts_of_two_counts_are_refused(source, tmp_path):
    write(plan(source), tmp_path / "out", (1, 2))
    write(plan(source), tmp_path / "out", (2, 3))
    with pytest.raises(qkit.ArtifactError, match=r"part-1-of-2 is one of 2 parts, and .*part-2-of-3 one of 3"):
        join_parts(plan(source), tmp_path / "out")


def changed(source):
    random = {name: array + 1 for name, array in tensors().items()}
    save_file(random, source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(1, 1))  # equal sizes and headers: time of change alone differs
    return plan(source)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda source: plan(source, "int8-g64"), "another recipe, shard size or version"),
        (lambda source: plan(source, shard_bytes=20_000), "another recipe, shard size or version"),
        (changed, "another source"),
    ],
)
def test_a_part_of_another_run_is_refused_by_name_and_stays(source, tmp_path, other, what):
    write(plan(source), tmp_path / "out", (1, 2))
    made = other(source)
    with pytest.raises(qkit.ArtifactError, match=rf"\.out\.part-1-of-2 is of {what}"):
        write(made, tmp_path / "out", (1, 2))
    write(made, tmp_path / "out", (2, 2))
    before = contents(tmp_path / ".out.part-1-of-2")
    with pytest.raises(qkit.ArtifactError, match=rf"\.out\.part-1-of-2 is of {what}"):
        join_parts(made, tmp_path / "out")
    assert contents(tmp_path / ".out.part-1-of-2") == before
    assert not (tmp_path / "out").exists()


def test_what_is_finished_is_not_finished_twice(source, tmp_path):
    for number in (1, 2):
        write(plan(source), tmp_path / "out", (number, 2))
    with pytest.raises(
        qkit.ArtifactError, match=r"part 2/2 is finished already, in .*\.out\.part-2-of-2: --finish joins"
    ):
        write(plan(source), tmp_path / "out", (2, 2))
    join_parts(plan(source), tmp_path / "out")
    with pytest.raises(qkit.PlanError, match="no finished parts beside it; it is finished already"):
        join_parts(plan(source), tmp_path / "out")


def test_a_part_whose_file_has_changed_is_refused(source, tmp_path):
    for number in (1, 2):
        write(plan(source), tmp_path / "out", (number, 2))
    file = next((tmp_path / ".out.part-2-of-2").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(qkit.ArtifactError, match=f"{re.escape(file.name)} has changed since it was written"):
        join_parts(plan(source), tmp_path / "out")


@pytest.mark.parametrize("name", [".out.part-1-of-2", ".out.writing"])
def test_a_directory_of_the_users_own_is_never_touched(source, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("x")
    with pytest.raises(qkit.ArtifactError, match=r"a model that qkit did not write|thesis\.tex"):
        write_in_parts(plan(source), tmp_path / "out")
    assert (tmp_path / name / "thesis.tex").read_text() == "x"


def test_a_model_that_qkit_did_not_write_is_not_replaced(source, tmp_path):
    for number in (1, 2):
        write(plan(source), tmp_path / "out", (number, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(qkit.ArtifactError):
        join_parts(plan(source), tmp_path / "out")
    assert (tmp_path / ".out.part-1-of-2").is_dir()


def test_the_work_of_an_interrupted_single_run_is_not_removed(source, tmp_path):
    for number in (1, 2):
        write(plan(source), tmp_path / "out", (number, 2))
    assert killed_at("rename", 1, write, plan(source), tmp_path / "out")  # all is written, and the last step is missing
    assert (tmp_path / ".out.writing").is_dir()
    with pytest.raises(qkit.ArtifactError, match="is from an interrupted run"):
        join_parts(plan(source), tmp_path / "out")
    assert list((tmp_path / ".out.writing").glob("*.safetensors"))
    write(plan(source), tmp_path / "out")


def test_parts_of_a_private_directory_are_private(source, tmp_path):
    write(plan(source), tmp_path / "out")
    (tmp_path / "out").chmod(0o700)
    for number in (1, 2):
        write(plan(source, "int8-g64"), tmp_path / "out", (number, 2))
        assert (tmp_path / f".out.part-{number}-of-2").stat().st_mode & 0o777 == 0o700
    join_parts(plan(source, "int8-g64"), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_an_interrupted_part_goes_on_and_a_second_writer_is_refused(source, tmp_path):
    assert killed_at("rename", 1, write, plan(source), tmp_path / "out", (1, 2))
    with parts.part_output(whole_of(plan(source), tmp_path / "out"), Part(1, 2)) as output:
        assert not output.missing
        with pytest.raises(qkit.LockedError, match="is held by another process"):
            write(plan(source), tmp_path / "out", (1, 2))


def whole_of(made, out):
    from qkit.streaming.carry_out import fingerprint

    return parts.Whole(out, made.layout, made.files, fingerprint(made))


@pytest.mark.parametrize("call", ["link", "rename", "unlink", "mkdir", "rmdir", "fsync", "pwrite"])
def test_a_kill_between_any_two_steps_of_joining_is_made_good(source, tmp_path, call):
    made, out = plan(source), tmp_path / "out"
    write(made, tmp_path / "one")
    new, kills = contents(tmp_path / "one"), 0
    for number in (1, 2):
        write(made, out, (number, 2))
    names = (".out.part-1-of-2", ".out.part-2-of-2")
    for name in names:
        shutil.copytree(tmp_path / name, tmp_path / f"saved{name}")
    write(plan(source, "int8-g64"), tmp_path / "old")
    old = contents(tmp_path / "old")
    for k in range(1, 60):
        for name in (*names, ".out.writing", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / ".out.journal").unlink(missing_ok=True)
        for name in names:
            shutil.copytree(tmp_path / f"saved{name}", tmp_path / name)
        shutil.copytree(tmp_path / "old", out)
        if not killed_at(call, k, join_parts, made, out):
            break
        kills += 1
        assert contents(out) in (old, new)
        with suppress(qkit.PlanError):  # where nothing was left to do
            join_parts(made, out)
        assert contents(out) == new
        left = {entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".out")}
        assert not left or all(not any((tmp_path / name).iterdir()) for name in left), left
    assert kills >= {"link": 5, "rename": 0, "mkdir": 1, "rmdir": 3}.get(call, 3)


def test_a_file_system_without_hard_links_gets_copies(source, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    write(plan(source), tmp_path / "one")
    for number in (1, 2):
        write(plan(source), tmp_path / "out", (number, 2))
    monkeypatch.setattr(os, "link", refuse)
    join_parts(plan(source), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize(("number", "count"), [(0, 1), (3, 2), (1, 0)])
def test_a_part_that_is_none_is_refused(number, count):
    with pytest.raises(qkit.PlanError, match="want 1/"):
        Part(number, count)
