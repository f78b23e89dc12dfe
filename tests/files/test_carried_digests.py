"""Exports of changed bytes: an export refuses those that it computes with, and carries on the digests of those that it copies."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import quantized
from typer.testing import CliRunner

import qkit
from qkit.artifact.verify import verify
from qkit.cli.application import application
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import open_model, read_model
from qkit.storage.known_digests import KnownDigests
from qkit.storage.layout import Slot
from qkit.storage.read import Stored, read_folder


def test_a_digest_is_carried_by_exactly_the_bytes_that_have_it():
    arrays = {"a": np.arange(8, dtype=np.int16), "b": np.zeros(8, np.int16)}
    place = Stored(Slot("a", "I16", (8,)), Path("model.safetensors"), 64)
    known = KnownDigests(arrays, {"a": "of a"}, {"a": place})
    data = arrays["a"].view(np.uint8).data
    others = [data[2:], data[:8], bytes(data), arrays["b"].data]
    assert [known.carry(block) for block in others] == [None] * 4
    assert known.left == ["a"]
    assert known.carry(data) == ("of a", place)
    assert known.left == []


def flip(folder, ending):
    """Flips the lowest bit of the first byte of a tensor, so that its value is another sound one; returns the tensor's name."""
    tensors, _ = read_folder(folder)
    stored = next(one for name, one in sorted(tensors.items()) if name.endswith(ending))
    with stored.file.open("r+b") as stream:
        stream.seek(stored.begin)
        byte = stream.read(1)[0]
        stream.seek(stored.begin)
        stream.write(bytes([byte ^ 1]))
    return stored.slot.name


def exported(folder, out, target):
    options = ["--without-tokenizer"] if target == "gguf" else []
    return CliRunner().invoke(application, ["export", str(folder), str(out), "--to", target, *options])


@pytest.mark.parametrize("target", ["mlx", "gguf", "dense"])
@pytest.mark.parametrize("layout", ["artifact", "mlx"])
def test_no_export_computes_with_changed_scales(layout, target, tmp_path):
    folder = quantized(tmp_path, "int4-g64", dtype="bfloat16")
    if layout == "mlx":
        export_mlx(read_model(folder), tmp_path / "first")
        folder = tmp_path / "first"
    name = flip(folder, "scale" if layout == "artifact" else "scales")
    done = exported(folder, tmp_path / "out", target)
    assert isinstance(done.exception, qkit.ArtifactError)
    assert name in str(done.exception) or "biases" in str(done.exception)  # the biases of MLX repeat the scales
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["weight_packed", "norm.weight"])
def test_changed_bytes_that_an_export_only_copies_are_found_in_the_export(ending, tmp_path):
    folder = quantized(tmp_path, "int4-g64", dtype="bfloat16")
    flip(folder, ending)
    assert exported(folder, tmp_path / "dense", "dense").exit_code != 0  # decoded values would hide it for good
    assert exported(folder, tmp_path / "mlx", "mlx").exit_code == 0
    (problem,) = verify(tmp_path / "mlx")
    assert "its bytes are not those that were written" in str(problem)


def test_experts_that_are_stacked_are_compared(tmp_path):
    folder = quantized(tmp_path, "int4-g32", family="mixtral", dtype="bfloat16")
    name = flip(folder, "experts.1.w1.weight_packed")
    done = exported(folder, tmp_path / "mlx", "mlx")
    assert f"{name}: its bytes" in str(done.exception)
    assert not (tmp_path / "mlx").exists()


def test_an_artifact_is_on_the_disk_when_it_appears_and_an_export_is_left_to_the_system(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def recorded(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    folder = quantized(tmp_path, "int4-g64")
    for target in ("mlx", "gguf", "dense"):
        assert exported(folder, tmp_path / target, target).exit_code == 0
    weights = [folder, tmp_path / "mlx", tmp_path / "dense"]
    files = [*(one / "model.safetensors" for one in weights), tmp_path / "gguf"]
    assert [file.stat().st_ino in synced for file in files] == [True, False, False, False]


def contents(folder):
    """The bytes of all files of a directory, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def refuse(number):
    def copy_file_range(*_):
        raise OSError(number, os.strerror(number))

    return copy_file_range


def trickle(source, target, size, begin, place):
    """Copies at most seven bytes, as a system may."""
    return os.pwrite(target, os.pread(source, min(size, 7), begin), place)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_an_export_has_the_same_bytes_where_the_system_copies_nothing_between_files(number, tmp_path, monkeypatch):
    folder = quantized(tmp_path, "int4-g64", dtype="bfloat16")
    export_mlx(open_model(folder), tmp_path / "copied")
    monkeypatch.setattr(os, "copy_file_range", refuse(number))
    export_mlx(open_model(folder), tmp_path / "written")
    monkeypatch.setattr(os, "copy_file_range", trickle)
    export_mlx(open_model(folder), tmp_path / "trickled")
    monkeypatch.delattr(os, "copy_file_range")
    export_mlx(open_model(folder), tmp_path / "elsewhere")
    first = contents(tmp_path / "copied")
    assert all(contents(tmp_path / name) == first for name in ("written", "trickled", "elsewhere"))
    assert list(verify(tmp_path / "copied")) == []


def test_unchanged_codes_do_not_pass_through_the_process(tmp_path, monkeypatch):
    moved, real = [], os.copy_file_range

    def counted(*arguments):
        moved.append(real(*arguments))
        return moved[-1]

    folder = quantized(tmp_path, "int4-g64", dtype="bfloat16")
    stored, _ = read_folder(folder)
    codes = sum(one.slot.nbytes for name, one in stored.items() if name.endswith("weight_packed"))
    monkeypatch.setattr(os, "copy_file_range", counted)
    export_mlx(open_model(folder), tmp_path / "mlx")
    assert sum(moved) >= codes > 0


def test_a_full_disk_and_a_shorter_source_are_errors_of_a_copy_that_leave_nothing(tmp_path, monkeypatch):
    folder = quantized(tmp_path, "int4-g64", dtype="bfloat16")
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
        export_mlx(open_model(folder), tmp_path / "mlx")
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with pytest.raises(qkit.ArtifactError, match="has become shorter: fetch it again"):
        export_mlx(open_model(folder), tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
