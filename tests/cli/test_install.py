"""The result of `pip install -c constraints.txt`, and qkit's own words on how to install it."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qkit
from qkit import installation
from qkit.installation import how_to_install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
}
TRITON = {"2.13.0": "3.7.1"}  #: by torch, what its wheels for Linux ask for; the resolution below checks it
PLATFORMS = {"x86_64-manylinux_2_35": "linux", "aarch64-apple-darwin": "macos"}


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
def test_every_dependency_has_a_pin_that_it_allows(line: str) -> None:
    wanted = Requirement(line)
    if canonicalize_name(wanted.name) == PROJECT["name"]:
        assert wanted.extras < EXTRAS.keys()
    else:
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])


def test_the_pins_of_torch_and_triton_go_together() -> None:
    assert PINS["triton"] == TRITON[PINS["torch"]]


@pytest.mark.network
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_extra_resolves_against_the_index_alone(
    platform: str, python: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert find_spec("uv"), "uv is not installed: it is in the extra dev"
    cache = tmp_path_factory.getbasetemp() / "uv"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    target = ["--python-version", python, "--python-platform", platform, "--only-binary", ":all:"]
    for extra in EXTRAS.keys() - {"test-readers"}:  # vLLM wants another torch, in an environment of its own
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", extra, *target]
        options = [
            "--constraint",
            "constraints.txt",
            "--no-config",
            "--no-header",
            "--no-python-downloads",
            "--cache-dir",
            str(cache),
        ]
        done = subprocess.run(
            [*command, *options, "--cache-dir", str(cache)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode and re.search("error sending request|dns error|tcp connect", done.stderr):
            pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
        assert done.returncode == 0, f"{extra}: {done.stderr}"
        chosen = dict(re.findall(r"^([\w.-]+)==(\S+)$", done.stdout, re.M))
        assert {name: version for name, version in chosen.items() if PINS.get(name, version) != version} == {}
        if extra in ("torch", "all"):
            assert ("triton" in chosen) == (PLATFORMS[platform] == "linux")


def test_a_remedy_names_the_distribution_that_is_installed() -> None:
    (script,) = {entry.dist.name for entry in entry_points(group="console_scripts", name="qkit") if entry.dist}
    assert script == PROJECT["name"] != "qkit"
    assert how_to_install("mlx") == f"pip install '{script}[mlx]'"


def test_a_renamed_distribution_is_named_in_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "my_fork-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-fork\nVersion: 2.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[console_scripts]\nqkit = qkit.cli:main\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    installation.installed.cache_clear()
    try:
        assert how_to_install("gguf") == "pip install 'my-fork[gguf]'"
    finally:
        installation.installed.cache_clear()


def test_no_message_names_an_extra_of_the_wrong_distribution() -> None:
    """`qkit` on the package index is somebody else's."""
    for folder in ("qkit", "backends", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"pip install '?qkit\b(?!-)", text), file
    assert not set(packages_distributions().get("qkit", [])) & {"qkit"}


def test_the_package_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qkit {qkit.__version__}\n"
