"""Failing writes, kills and full disks, at every or any moment: the old directory or the new one, and the same bytes after."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from alike import contents
from safetensors.numpy import save_file

import qkit
from qkit.artifact.verify import verify
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

CALLS = ("open", "pwrite", "truncate", "fsync", "rename", "mkdir", "unlink", "rmdir")
KILLS = 20


def model(folder, *, layers, width):
    random = np.random.default_rng(0)
    folder.mkdir()
    shape = (width, 64)
    named = {
        f"layers.{i}.up_proj.weight": random.standard_normal(shape).astype(ml_dtypes.bfloat16) for i in range(layers)
    }
    save_file({**named, "norm.weight": np.ones(64, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def run(source, out, recipe="int4-g64", workers=1):
    plan = make_plan(Path(source), qkit.recipe(recipe), shard_bytes=1 << 20)
    quantize_directory(plan, Path(out), engine=qkit.backend("numpy"), workers=workers, tick=lambda name, done: None)


class Failing:
    """The system's calls, the k-th of which fails as on a full disk; a write that fails has written half."""

    def __init__(self, monkeypatch, k):
        self.left = k
        for name in CALLS:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), half=name == "pwrite"))

    def _failing(self, call, *, half):
        def counted(*arguments, **options):
            self.left -= 1
            if not self.left:
                if half:
                    descriptor, data, offset = arguments
                    call(descriptor, data[: len(data) // 2], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return counted


@pytest.mark.parametrize("replacing", [False, True])
def test_the_kth_call_fails_for_every_k(tmp_path, replacing):
    source = model(tmp_path / "in", layers=2, width=4)
    run(source, tmp_path / "new")
    new, old = contents(tmp_path / "new"), None
    if replacing:
        run(source, tmp_path / "old", "int3-g64")
        old = contents(tmp_path / "old")
    failures = 0
    for k in range(1, 1000):
        home = tmp_path / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        if replacing:
            shutil.copytree(tmp_path / "old", home / "out")
        with pytest.MonkeyPatch.context() as patch:
            calls = Failing(patch, k)
            try:
                run(source, home / "out")
            except OSError as error:
                failures += error.errno == errno.ENOSPC
        assert contents(home / "out") in (old, new), k
        if calls.left > 0:
            break
        run(source, home / "out")
        assert contents(home / "out") == new
        assert [entry.name for entry in home.iterdir()] == ["out"]
    assert calls.left > 0
    assert failures > 30
    assert contents(home / "out") == new


def test_a_kill_at_any_moment_is_made_good_by_running_again(tmp_path):
    source = model(tmp_path / "in", layers=160, width=1024)
    run(source, tmp_path / "whole", workers=2)
    whole = contents(tmp_path / "whole")
    run(source, tmp_path / "old", "int3-g64", workers=2)
    old = contents(tmp_path / "old")
    processes = get_context("forkserver")  # not fork: threads of other tests may hold locks
    processes.set_forkserver_preload([__name__])
    chance, interrupted, resumed = random.Random(0), 0, 0
    longest = 0.1
    for attempt in range(KILLS):
        out = tmp_path / f"out{attempt}"
        if attempt % 2:
            shutil.copytree(tmp_path / "old", out)
        child = processes.Process(target=run, args=(str(source), str(out)), kwargs={"workers": 2})
        start = time.perf_counter()
        child.start()
        if attempt > 1:
            time.sleep(chance.uniform(0, longest))
            child.kill()
        child.join()
        if attempt <= 1:
            assert child.exitcode == 0
            longest = time.perf_counter() - start  # the second time: the first one starts the server
        found = contents(out)
        assert found in (whole, old if attempt % 2 else None)
        interrupted += child.exitcode != 0
        resumed += (tmp_path / f".out{attempt}.journal").exists() and found != whole
        run(source, out, workers=2)
        assert contents(out) == whole
        assert not list(tmp_path.glob(f".out{attempt}*"))
    assert interrupted > KILLS // 2
    assert resumed


def test_a_full_disk_leaves_the_old_and_room_makes_it_good(tmp_path):
    """On a tmpfs of its own, in a mount namespace that ends with the process."""
    source = model(tmp_path / "in", layers=48, width=1024)
    run(source, tmp_path / "whole")
    size = sum(len(data) for data in contents(tmp_path / "whole").values())
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = "mount -t tmpfs -o size=$2 none $1 && exec $3 $4 $5 $1 $6"
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-ec",
        inside,
        "sh",
        disk,
        str(size * 16 // 5),
        sys.executable,
    ]
    if not shutil.which("unshare") or subprocess.run([*command, "-c", "pass"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a tmpfs; the failing calls stand for it")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command += [__file__, source, tmp_path / "whole"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "old, full, old, room, new\n"


def _on_a_small_disk(disk: Path, source: Path, whole: Path) -> None:
    """The test above runs this on its small disk."""
    shutil.copytree(whole, disk / "out")
    before = contents(disk / "out")
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize // 2))
    print("old", end=", ")
    try:
        run(source, disk / "out", "int8-g64")
    except OSError as error:
        print("full" if error.errno == errno.ENOSPC else error, end=", ")
    assert contents(disk / "out") == before
    print("old", end=", ")
    shutil.rmtree(disk / "out")
    (disk / "ballast").unlink()
    print("room", end=", ")
    run(source, disk / "out", "int8-g64")
    assert list(verify(disk / "out")) == []
    print("new")


if __name__ == "__main__":
    _on_a_small_disk(*map(Path, (sys.argv[2], sys.argv[1], sys.argv[3])))
