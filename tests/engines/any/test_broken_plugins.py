"""Plugins that are broken in many ways, all installed at once: only they are left out, and only where they are met."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qkit
from qkit import installation
from qkit.engines import discovery, registry

HOOK = "from qkit.engines.hookspecs import hookimpl\nfrom qkit.engines.protocol import BackendSpec\nfrom pathlib import Path\n"
BACKENDS = HOOK + "@hookimpl\ndef qkit_backends():\n    "
RECIPES = HOOK + "@hookimpl\ndef qkit_recipes():\n    "
GOOD = 'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 8\n[[rules]]\nmatch = "*"\nweight = "w"\n'


def one(name: str, target: str = "qkit.engines.numpy:NumpyBackend", framework: str = "numpy") -> str:
    return f"BackendSpec({name!r}, {target!r}, {framework!r}, 'pip install it')"


#: The source of each plugin, and words of the reason for which it is left out.
BROKEN = {
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exits_with_words": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "hangs": ("import time; time.sleep(600)", "did not answer within"),
    "spins": ("while True: pass", "did not answer within"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
    "reads_null": ("import ctypes; ctypes.string_at(0)", "signal 11"),
    "aborts": ("import os; os.abort()", "signal 6"),
    "is_killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    "leaves": ("import os; os._exit(0)", "without an answer: exit code 0"),
    "leaves_with_3": ("import os; os._exit(3)", "without an answer: exit code 3"),
    "misspells_python": ("def qkit_backends(:", "SyntaxError"),
    "lacks_a_package": (
        "import no_such_package_at_all",
        "ModuleNotFoundError: No module named 'no_such_package_at_all'",
    ),
    "raises": ("raise RuntimeError('its server is on fire')", "RuntimeError: its server is on fire"),
    "raises_a_bare_exception": ("raise BaseException", "BaseException"),
    "raises_what_cannot_be_shown": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        "Mute",
    ),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "has_no_hook": ("x = 1", "it has no hook"),
    "has_an_unmarked_hook": ("def qkit_backends(): return []", "it has no hook"),
    "misspells_a_hook": (HOOK + "@hookimpl\ndef qkit_backend(): return []", "unknown hook 'qkit_backend'"),
    "wants_an_argument": (HOOK + "@hookimpl\ndef qkit_backends(device): return []", "PluginValidationError"),
    "gives_none": (BACKENDS + "return None", "qkit_backends: TypeError"),
    "gives_a_number": (RECIPES + "return 7", "qkit_recipes: TypeError"),
    "gives_a_list_of_texts": (BACKENDS + "return ['engine']", "not a BackendSpec"),
    "gives_a_path_as_text": (RECIPES + "return ['mine.toml']", "not a Traversable"),
    "never_stops_giving": (BACKENDS + f"while True: yield {one('again')}", "more than"),
    "stops_in_the_middle": (BACKENDS + f"yield {one('first')}\n    raise OSError('no disk')", "OSError: no disk"),
    "exits_in_its_hook": (BACKENDS + "import sys; sys.exit(0)", "SystemExit: 0"),
    "takes_numpy": (BACKENDS + f"return [{one('numpy')}]", "a backend 'numpy', which is there already"),
    "takes_a_recipe": (
        RECIPES + "return [Path(__file__).with_name('int4-g64.toml')]",
        "a recipe 'int4-g64', which is there",
    ),
    "takes_an_alias": (RECIPES + "return [Path(__file__).with_name('W4A16.toml')]", "an alias of int4-g128-midmax"),
    "takes_a_name_twice": (BACKENDS + f"return [{one('twin')}, {one('twin')}]", "two backends have one name"),
    "has_no_module": (BACKENDS + f"return [{one('lost', 'no_such_module_at_all:Engine')}]", "which is not there"),
    "describes_badly": (BACKENDS + "return [BackendSpec(None, 7, 'numpy', 'pip install it')]", "want texts"),
    "closes_its_output": ("import os; os.closerange(3, 50)", "without an answer: exit code 1"),
}
#: These are not broken, or only in part, or only when they are used.
SOUND = {
    "prints": "print('hello')\n" + BACKENDS + f"return [{one('printing')}]",
    "lacks_its_framework": BACKENDS + f"return [{one('absent', 'absent:Engine', 'no_such_framework')}]",
    "lacks_its_class": BACKENDS + f"return [{one('classless', 'qkit.engines.numpy:NoSuchClass')}]",
    "exits_when_used": BACKENDS + f"return [{one('exiting', 'exiting_when_used:Engine')}]",
    "brings_recipes": RECIPES + "here = Path(__file__)\n"
    "    return [here.with_name(f'{name}.toml') for name in ('good', 'no-toml', 'no-text', 'no-recipe', 'no-file')]",
}
UNREADABLE = {"no-toml", "no-text", "no-recipe", "no-file"}


def install(folder: Path, name: str, source: str, *, entry: str = "") -> None:
    (folder / f"broken_{name}.py").write_text(source, encoding="utf-8")
    metadata = folder / f"plugin_{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[qkit]\n{entry or name} = broken_{name}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them are installed, as pip would."""
    folder = tmp_path_factory.mktemp("site")
    for name, source in {**{name: source for name, (source, _) in BROKEN.items()}, **SOUND}.items():
        install(folder, name, source)
    install(folder, "usurps", "raise RuntimeError('usurped')", entry="numpy")
    for name in ("int4-g64", "W4A16", "good"):
        (folder / f"{name}.toml").write_text(GOOD, encoding="utf-8")
    (folder / "no-toml.toml").write_text("schema = ", encoding="utf-8")
    (folder / "no-text.toml").write_bytes(b"\xff\xfe\x00")
    (folder / "no-recipe.toml").write_text("schema = 99", encoding="utf-8")
    (folder / "exiting_when_used.py").write_text("raise SystemExit(0)", encoding="utf-8")
    damaged = folder / "plugin_damaged-1.0.dist-info"
    damaged.mkdir()
    (damaged / "entry_points.txt").write_text("[qkit]\nno equals sign\n", encoding="utf-8")
    return folder


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them in this process, too."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(discovery, "SECONDS", 5.0)
    installation.installed.cache_clear()
    registry.forget()
    yield
    monkeypatch.undo()
    installation.installed.cache_clear()
    registry.forget()


@pytest.mark.usefixtures("installed")
def test_nothing_is_asked_for_a_name_that_is_qkits_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert qkit.backend("numpy").name == "numpy"
    assert qkit.recipe("int4-g64").rules
    assert qkit.recipe("W4A16").name == "int4-g128-midmax"
    assert registry.backend_of(__import__("numpy").zeros(3)).name == "numpy"
    assert registry.own().broken == {}


@pytest.mark.usefixtures("installed")
def test_only_the_broken_are_left_out() -> None:
    reasons = registry.plugins().broken
    for name, (_, words) in BROKEN.items():
        assert words in reasons[name], (name, reasons[name])
    assert reasons["numpy of plugin-usurps"] == "RuntimeError: usurped"
    assert "its entry_points.txt is malformed" in reasons["a distribution without a name"]
    assert reasons.keys() == {*BROKEN, "numpy of plugin-usurps", "a distribution without a name"}
    status = {status.name: status for status in qkit.backends()}
    assert status["numpy"].ready
    assert status["printing"].ready
    assert status["absent"].reason == "needs no_such_framework: pip install it"
    assert qkit.backend("printing").name == "numpy"
    assert {"good", "int4-g64"} <= set(qkit.recipes())
    assert not UNREADABLE & set(qkit.recipes())
    assert registry.left_out().keys() == reasons.keys() | UNREADABLE
    assert qkit.recipe("good").name == "good"
    assert qkit.recipe("int4-g64").rules[-1].weight == qkit.Grid("int4", 64)
    for name in UNREADABLE:
        with pytest.raises(qkit.RecipeError, match=name):
            qkit.recipe(name)
    for name, words in {
        "classless": "NoSuchClass",
        "exiting": "SystemExit: 0",
        "exits": "is disabled: SystemExit",
    }.items():
        with pytest.raises(qkit.BackendError, match=f"backend '{name}' .*{words}"):
            qkit.backend(name)
    assert not [name for name in sys.modules if name.startswith("broken_")]


def test_the_command_line_works_among_them_all(folder: Path) -> None:
    """One process runs several commands, as its time is that of the plugin that hangs."""
    code = """
import json, sys
from typer.testing import CliRunner
from qkit.engines import discovery
from qkit.cli.application import application
discovery.SECONDS = 5.0
for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(application, line)
    print(json.dumps([done.exit_code, done.stdout, done.stderr]))
"""
    lines = [
        ["backends", "--json"],
        ["recipes", "--json"],
        ["recipes"],
        ["recipes", "int4-g64"],
    ]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-W", "error", "-c", code, json.dumps(lines)]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    backends, recipes, table, one = map(json.loads, done.stdout.splitlines())
    assert [backends[0], recipes[0], table[0], one[0]] == [0, 0, 0, 0]
    rows = {row["name"]: row for row in json.loads(backends[1])}
    assert rows["numpy"]["ready"]
    assert {name for name, row in rows.items() if row["reason"].startswith("plugin disabled")} == {
        *(*BROKEN, "numpy of plugin-usurps", "a distribution without a name")
    }
    assert {row["name"] for row in json.loads(recipes[1])} == {*qkit.recipes(), "good"}
    assert "int4-g64" in table[1]
    for name in (*BROKEN, *UNREADABLE):
        assert f"left out: {name}: " in table[2]
    assert "int4-g64, version" in one[1]


def test_a_probe_goes_on_where_a_backend_does_not_load(tmp_path: Path) -> None:
    install(tmp_path, "lacks_its_class", SOUND["lacks_its_class"])
    code = """
from typer.testing import CliRunner
import qkit
from qkit.engines import registry
from qkit.cli.application import application
registry._installed = lambda package: package == "numpy"
done = CliRunner().invoke(application, ["backends", "--probe"])
print(done.stderr)
assert done.exit_code == 0, done.exception
assert "0 layers prepared" in done.stdout
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "left out: backend 'classless' cannot be loaded from qkit.engines.numpy:NoSuchClass" in done.stdout
