"""The result of `pip install -c constraints.txt`, and qkit's own words on how to install it."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
from jobs import JOBS, closure
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import qkit
from qkit import installation
from qkit.cli.application import application
from qkit.installation import ENGINE, TUNING, how_to_install

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


def test_the_extras_are_jobs() -> None:
    assert EXTRAS.keys() == {"cuda", "train-torch", "mac", "train-mlx", "gguf", "dev"}
    assert JOBS.keys() - {""} == EXTRAS.keys() - {"dev"}


def test_the_code_names_extras_that_there_are() -> None:
    named = {ENGINE, TUNING}
    for folder in ("qkit", "backends", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(
                re.findall(r"""(?:how_to_install\(["']|qkit-quant\[)([\w-]+)""", file.read_text(encoding="utf-8"))
            )
    assert {"cuda", "mac", "train-torch"} <= named <= EXTRAS.keys()


def test_the_pages_name_extras_that_there_are() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        one
        for page in pages
        for many in re.findall(r"'\.\[([\w,-]+)\]'", page.read_text(encoding="utf-8"))
        for one in many.split(",")
    }
    assert {"train-torch", "mac"} <= named <= EXTRAS.keys()
    table = (ROOT / "docs" / "start" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| [^|]+ \| `([\w-]+)` \|", table, re.M)) == EXTRAS.keys()


@pytest.mark.parametrize("extra", JOBS)
def test_an_extra_alone_does_its_job(extra: str, small_model: Path, tmp_path: Path) -> None:
    """With all else hidden from `import`, in this process's children too."""
    wanted = {"cuda": "torch", "train-torch": "trl", "mac": "mlx_lm", "train-mlx": "mlx_lm_lora", "gguf": "gguf"}
    if extra and not find_spec(wanted[extra]):
        pytest.skip(f"{wanted[extra]} is not installed")
    copytree(small_model, tmp_path / "job")
    allowed = closure(PROJECT["name"], extra)
    tests = str(ROOT / "tests")
    hide = f"import sys; sys.path.append({tests!r}); from jobs import allow; allow({allowed!r})"
    (tmp_path / "sitecustomize.py").write_text(hide, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "jobs.py"), extra]
    done = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


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
    for extra in EXTRAS:
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
        if extra in ("cuda", "train-torch", "dev"):
            assert ("triton" in chosen) == (PLATFORMS[platform] == "linux")


def test_a_remedy_names_the_distribution_that_is_installed() -> None:
    (script,) = {entry.dist.name for entry in entry_points(group="console_scripts", name="qkit") if entry.dist}
    assert script == PROJECT["name"] != "qkit"
    assert how_to_install("mac") == f"pip install '{script}[mac]'"


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


@pytest.mark.parametrize("command", [["-h"], ["plan", "-h"], ["mlx-lora", "-h"]])
def test_the_short_option_shows_help(command: list[str]) -> None:
    done = CliRunner().invoke(application, command)
    assert done.exit_code == 0
    assert "Show this message and exit." in done.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete_commands_and_completes_them(
    shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # tests may run in no shell at all
    done = CliRunner().invoke(application, ["--show-completion", shell], prog_name="qkit")
    assert done.exit_code == 0, done.output
    assert "_QKIT_COMPLETE" in done.output
    words = {"_QKIT_COMPLETE": f"complete_{shell}", "COMP_WORDS": "qkit quan", "COMP_CWORD": "1"}
    words |= {"_TYPER_COMPLETE_ARGS": "qkit quan", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = CliRunner().invoke(application, [], prog_name="qkit", env=words)
    assert "quantize" in done.output
