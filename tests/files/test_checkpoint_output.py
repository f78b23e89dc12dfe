"""Directories are written whole or not at all, and are the bytes that safetensors itself would write."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alike import contents
from checkpoints import TENSORS, killed_at, stream, write
from safetensors.numpy import load_file, save_file

import qkit
from qkit.storage import swap
from qkit.storage.arrays import read_file
from qkit.storage.layout import TYPE_NAMES, Slot, lay_out
from qkit.storage.staging import replaced_file
from qkit.storage.write import Output, Stream, write_directory

placed = swap.put_in_place


def test_one_file_is_what_safetensors_writes(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"qkit": "é"})
    ours = write(tmp_path / "out") / "model.safetensors"
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("most", [1, 30, 60, 100])
def test_shards_hold_at_most_what_they_may_and_safetensors_opens_them(tmp_path, most):
    folder = write(tmp_path / "out", shard_bytes=most)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard in shards:
        found, _ = read_file(folder / shard)  # after safetensors' own checks
        assert set(found) == {name for name, file in index["weight_map"].items() if file == shard}
        assert sum(array.nbytes for array in found.values()) <= most or len(found) == 1
        for name, array in found.items():
            assert array.tobytes() == TENSORS[name].tobytes()


def test_two_writes_are_the_same_bytes_whatever_the_order(tmp_path):
    backwards = dict(reversed(TENSORS.items()))
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b", backwards))


def test_every_tensor_begins_where_its_type_is_aligned():
    slots = [Slot(name, TYPE_NAMES[array.dtype.name], array.shape) for name, array in TENSORS.items()]
    layout = lay_out(slots, metadata={})
    for name, place in layout.places.items():
        assert place.begin % TENSORS[name].dtype.itemsize == 0


def test_files_are_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        folder = write(tmp_path / "out")
    finally:
        os.umask(old)
    assert {entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {0o640}


def test_a_private_directory_stays_private(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    seen = []
    monkeypatch.setattr(swap, "put_in_place", lambda new, *rest: seen.append(new.stat().st_mode) or placed(new, *rest))
    for _ in range(2):  # in place of an empty directory, and of an earlier output
        write(out)
        seen.append(out.stat().st_mode)
    assert {mode & 0o777 for mode in seen} == {0o700}


def test_a_private_file_stays_private(tmp_path):
    file = tmp_path / "report.html"
    file.touch(mode=0o600)
    with replaced_file(file) as new:
        new.write_text("x")
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, "x")


def test_nothing_is_left_beside(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / "out", {"other": np.ones(3)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"other"}


class Stop(Exception):
    """Not an error of qkit's."""


def stopping(name, array):
    def blocks():
        yield array.tobytes()[:3]
        raise Stop

    return Stream(Slot(name, TYPE_NAMES[array.dtype.name], array.shape), blocks)


def interrupt(folder, fingerprint, tensors=TENSORS):
    """A run that ends in the middle of the last tensor."""
    *first, last = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    streams = [stream(name, tensors[name]) for name in first] + [stopping(last, tensors[last])]
    with pytest.raises(Stop):
        write_directory(folder, streams, metadata={"qkit": "é"}, files={"config.json": b"{}"}, fingerprint=fingerprint)


def test_an_interrupted_run_leaves_the_old_directory(tmp_path):
    before = contents(write(tmp_path / "out"))
    interrupt(tmp_path / "out", "")
    assert contents(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_run_goes_on_from_where_it_was_interrupted(tmp_path):
    whole = contents(write(tmp_path / "whole", fingerprint="x"))
    interrupt(tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()
    slots = [stream(name, array).slot for name, array in TENSORS.items()]
    layout = lay_out(slots, metadata={"qkit": "é"})
    output = Output(tmp_path / "out", layout, files={"config.json": b"{}"}, fingerprint="x")
    with output:
        assert output.missing == ["flag"]
        output.write("flag", TENSORS["flag"].tobytes())
        output.close("flag")
    assert contents(tmp_path / "out") == whole


def test_what_was_damaged_meanwhile_is_written_again(tmp_path):
    whole = contents(write(tmp_path / "whole", fingerprint="x"))
    interrupt(tmp_path / "out", "x")
    weights = tmp_path / ".out.writing/model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    (weights.parent / "stray.bin").write_bytes(b"")
    assert contents(write(tmp_path / "out", fingerprint="x")) == whole


@pytest.mark.parametrize(
    "other", [{"fingerprint": "y"}, {"files": {"config.json": b"{ }"}}, {"metadata": {"qkit": ""}}]
)
def test_a_run_with_another_fingerprint_is_refused_and_removes_nothing(tmp_path, other):
    interrupt(tmp_path / "out", "x")
    before = contents(tmp_path / ".out.writing")
    with pytest.raises(qkit.ArtifactError, match="interrupted run with another source, recipe"):
        write(tmp_path / "out", **{"fingerprint": "x", **other})
    assert contents(tmp_path / ".out.writing") == before


def test_a_second_writer_is_refused(tmp_path):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1])]!r}; from pathlib import Path\n"
    code += f"from checkpoints import write; write(Path({str(tmp_path / 'out')!r}))"
    with Output(tmp_path / "out", lay_out([], metadata={}), files={}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "LockedError" in done.stderr
    assert done.returncode
    subprocess.run([sys.executable, "-c", code], check=True)  # the lock goes with its owner


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("call", ["rename", "unlink", "mkdir", "rmdir", "fsync", "pwrite"])
@pytest.mark.parametrize("fingerprint", ["", "x"])
def test_a_kill_between_any_two_steps_is_made_good(tmp_path, monkeypatch, call, exchange, fingerprint):
    if not exchange:
        monkeypatch.setattr(swap, "EXCHANGE", 1 << 30)  # a flag that no system knows
    out = tmp_path / "out"
    old, kills = contents(write(tmp_path / "old", {"old": np.ones(3)})), 0
    new = contents(write(tmp_path / "new"))
    for k in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        write(out, {"old": np.ones(3)})
        if not killed_at(call, k, write, out, fingerprint=fingerprint):
            break
        kills += 1
        assert (not out.exists() and not exchange) or contents(out) in (old, new)
        assert contents(write(out, fingerprint=fingerprint)) == new
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", "old", "new"}
    assert kills >= {"rename": 2 - 2 * exchange, "mkdir": 1, "rmdir": 1}.get(call, 3)


@pytest.mark.parametrize("stranger", ["thesis.tex", "checkpoints/"])
def test_what_was_not_written_here_is_never_removed(tmp_path, stranger):
    folder = write(tmp_path / "out")
    (folder / stranger).mkdir() if stranger.endswith("/") else (folder / stranger).write_text("x")
    with pytest.raises(qkit.ArtifactError, match="which save did not write"):
        write(folder)
    assert (folder / stranger).exists()
