"""The wheels of `make wheels`: the index takes them, and each does the job of each extra in a new environment."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from jobs import JOBS

ROOT = Path(__file__).parents[2]
NO_NETWORK = "NewConnectionError|Temporary failure in name resolution|error sending request|dns error|tcp connect"
KERNELS = "from qkit.native.library import available; print(available())"
ALONE = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
pytestmark = pytest.mark.network


def run(*command, **options):
    """The output of a command; skips where the index is out of reach."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=ALONE, **options)
    if done.returncode and re.search(NO_NETWORK, done.stderr):
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make wheels` fills, in a copy of the tree. This environment is the one that `make` would make first."""
    assert find_spec("uv"), "uv is not installed: it is in the extra dev"
    tree = tmp_path_factory.mktemp("tree") / "qkit"
    copytree(
        ROOT, tree, ignore=ignore_patterns(".git", ".venv", "site", "dist", ".*_cache", ".readers", "kernels.compiled")
    )
    run("make", f"--old-file={sys.prefix}/ready", f"VENV={sys.prefix}", "wheels", cwd=tree)
    return tree / "dist"


def test_there_are_the_source_a_wheel_for_any_machine_and_one_with_kernels(dist):
    any_machine, *others = sorted(dist.glob("*.whl"), key=lambda file: "-none-any" not in file.name)
    (source,) = dist.glob("*.tar.gz")
    assert any_machine.stem.endswith("-py3-none-any")
    assert not [name for name in zipfile.ZipFile(any_machine).namelist() if name.endswith(".compiled")]
    if sys.platform == "linux":
        (wheel,) = others
        assert "manylinux2014" in wheel.stem
        assert "qkit/native/kernels.compiled" in zipfile.ZipFile(wheel).namelist()
    with tarfile.open(source) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"qkit/native/kernels.c", "Makefile", "constraints.txt", "docs/start/cuda.md", "tests/jobs.py"} <= names
    run(sys.executable, "-m", "uv", "tool", "run", "twine", "check", "--strict", *dist.glob("*.whl"), source)


@pytest.mark.parametrize("kind", ["any", "kernels", "source"])
def test_each_file_installs_and_does_the_base_job(kind, dist, small_model, tmp_path):
    files = {"any": "*-none-any.whl", "kernels": "*-manylinux*.whl", "source": "*.tar.gz"}
    found = list(dist.glob(files[kind]))
    if not found and sys.platform != "linux":
        pytest.skip("auditwheel is for Linux")
    python = installed(found[0], "", tmp_path)
    copytree(small_model, tmp_path / "job")
    run(python, ROOT / "tests" / "jobs.py", "", cwd=tmp_path / "job")
    assert run(tmp_path / "venv" / "bin" / "qkit", "--version").startswith("qkit ")
    if kind != "source":  # which has kernels where there is a compiler
        assert run(python, "-c", KERNELS, cwd=tmp_path).strip() == str(kind == "kernels")


@pytest.mark.parametrize("extra", [extra for extra in JOBS if extra])
def test_an_extra_of_the_wheel_does_its_job(extra, dist, small_model, tmp_path):
    """`$QKIT_PIP_OPTIONS` may name an index with torch for CPUs."""
    wheels = sorted(dist.glob("*.whl"), key=lambda file: "-none-any" in file.name)  # with kernels, where there is one
    python = installed(wheels[0], extra, tmp_path)
    copytree(small_model, tmp_path / "job")
    run(python, ROOT / "tests" / "jobs.py", extra, cwd=tmp_path / "job")


def installed(file, extra, folder):
    """The Python of a new environment in `folder` with a wheel or a source, and an extra."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    options = [
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
        *shlex.split(os.environ.get("QKIT_PIP_OPTIONS", "")),
    ]
    run(python, "-m", "pip", "install", *options, f"{file}[{extra}]" if extra else file)
    return python


def test_cibuildwheel_accepts_its_configuration_and_builds_for_three_machines():
    found = []
    for platform, machines in (("linux", "x86_64 aarch64"), ("macos", "arm64")):
        for machine in machines.split():
            words = [
                "tool",
                "run",
                "cibuildwheel",
                "--print-build-identifiers",
                "--platform",
                platform,
                "--archs",
                machine,
            ]
            found += run(sys.executable, "-m", "uv", *words, ROOT).split()
    assert found == ["cp311-manylinux_x86_64", "cp311-manylinux_aarch64", "cp311-macosx_arm64"]
