"""Exports of changed bytes: an export refuses those that it computes with, and carries on the digests of those that it copies."""

import os

import numpy as np
import pytest
from checkpoints import quantized
from typer.testing import CliRunner

import qkit
from qkit.artifact.verify import verify
from qkit.cli.application import application
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model
from qkit.storage.known_digests import KnownDigests
from qkit.storage.read import read_folder


def test_a_digest_is_carried_by_exactly_the_bytes_that_have_it():
    arrays = {"a": np.arange(8, dtype=np.int16), "b": np.zeros(8, np.int16)}
    known = KnownDigests(arrays, {"a": "of a"}, {})
    data = arrays["a"].view(np.uint8).data
    others = [data[2:], data[:8], bytes(data), arrays["b"].data]
    assert [known.carry(block) for block in others] == [None] * 4
    assert known.left == ["a"]
    assert known.carry(data) == "of a"
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
