"""Which plugins there are and what each brings, or why it is left out. A third-party plugin is asked in a process of its own.

Nothing of a third party is imported here: its process reports descriptions of backends and the texts of recipes.
"""

from __future__ import annotations  # the protocols are for the type checker: `import qkit` stays cheap

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import BackendError
from qkit.installation import GROUP, installed

if TYPE_CHECKING:  # `import qkit` stays cheap: discovery is paid for when something is looked up
    from importlib.metadata import EntryPoint

    from qkit.engines.protocol import BackendSpec

SECONDS = 10.0  #: the longest time that a third-party plugin may take to answer
MOST = 10_000  #: how many backends or recipes one plugin may bring


@dataclass(frozen=True, slots=True)
class Brought:
    """The backends and recipes of one plugin.

    Attributes:
        recipes: the text of each file by the recipe's name.
        unreadable: why a recipe cannot be read, by its name.
    """

    backends: tuple[BackendSpec, ...] = ()
    recipes: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def own_plugins() -> list[EntryPoint]:
    """The entry points of qkit's own distribution."""
    return [entry for found in installed() if found.own for entry in found.plugins]


def foreign_plugins() -> tuple[dict[str, EntryPoint], dict[str, str]]:
    """Third-party entry points by label, and why others cannot be read. One that is there twice counts once.

    A label is the entry point's name, with its distribution where qkit or another plugin has the name.
    """
    own = own_plugins()
    taken, seen = {entry.name for entry in own}, {(entry.name, entry.value) for entry in own}
    entries, broken = {}, {}
    for found in installed():
        if found.own:
            continue
        if found.broken:
            broken[found.name or "a distribution without a name"] = found.broken
        for entry in found.plugins:
            if (entry.name, entry.value) in seen:
                continue
            seen.add((entry.name, entry.value))
            label = f"{entry.name} of {found.name or entry.value}" if entry.name in taken else entry.name
            taken.add(entry.name)
            entries[label] = entry
    return entries, broken


def ask(plugin: object) -> Brought:
    """Calls the hooks of a plugin that is imported.

    Raises:
        BackendError: it has no hook, or a hook gives something else than it should.
        pluggy.PluginValidationError: a hook is misspelt or has arguments.
        Exception: whatever its hooks raise.
    """
    from importlib.resources.abc import Traversable

    from pluggy import PluginManager

    from qkit.engines import hookspecs
    from qkit.engines.protocol import BackendSpec

    manager = PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise BackendError("it has no hook: mark qkit_backends or qkit_recipes with qkit.engines.hookspecs.hookimpl")
    answers: dict[str, list[Any]] = {}
    for hook, wanted in (("qkit_backends", BackendSpec), ("qkit_recipes", Traversable)):
        implementations = getattr(manager.hook, hook).get_hookimpls()
        answers[hook] = [item for one in implementations for item in _answer(one.function, hook, wanted)]
    recipes, unreadable = {}, {}
    for file in answers["qkit_recipes"]:
        name = file.name.removesuffix(".toml")
        if name in recipes or name in unreadable:
            raise BackendError(f"qkit_recipes: two files for a recipe {name!r}")
        try:
            recipes[name] = file.read_text(encoding="utf-8-sig")
        except Exception as error:  # a file may fail in any way; it disables only itself
            unreadable[name] = explain(error)
    names = [spec.name for spec in answers["qkit_backends"]]
    if len(set(names)) < len(names):
        raise BackendError(f"qkit_backends: two backends have one name, of {', '.join(names)}")
    return Brought(tuple(answers["qkit_backends"]), recipes, unreadable)


def _answer(function: Any, hook: str, wanted: type) -> list[Any]:
    from itertools import islice

    try:
        answer = list(islice(function(), MOST + 1))
    except Exception as error:
        raise BackendError(f"{hook}: {explain(error)}") from error
    if len(answer) > MOST:
        raise BackendError(f"{hook}: it gives more than {MOST}")
    for item in answer:
        if not isinstance(item, wanted):
            raise BackendError(f"{hook}: it gives {item!r}, not a {wanted.__name__}")
    return answer


def explain(error: BaseException) -> str:
    """Class and message in one line; of an error of qkit, and of pluggy's about hooks, the message only."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # an error's own code may fail
        message = ""
    return message if isinstance(error, BackendError) else f"{type(error).__name__}: {message}".removesuffix(": ")


def ask_all(entries: dict[str, EntryPoint]) -> dict[str, Brought | str]:
    """What each plugin brings, or why not, each from its own process; several at a time.

    A plugin that exits, crashes, hangs or prints harms only its process.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not entries:
        return {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(entries, threads.map(_ask_apart, entries.values()), strict=True))


def _ask_apart(entry: EntryPoint) -> Brought | str:
    script = Path(__file__).with_name("ask_plugin.py")
    request = json.dumps({"path": sys.path, "name": entry.name, "value": entry.value})
    import subprocess  # here, as `import qkit` needs none of it

    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), request],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {SECONDS:g} seconds"
    except (OSError, ValueError) as error:
        return f"it could not be asked: {explain(error)}"
    if not done.stdout:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return f"its process ended without an answer: {how}"
    from qkit.engines.protocol import BackendSpec

    try:
        answer = json.loads(done.stdout)
        if "broken" in answer:
            return str(answer["broken"])
        specs = tuple(BackendSpec(**{**spec, "requires": tuple(spec["requires"])}) for spec in answer["backends"])
        return Brought(specs, answer["recipes"], answer["unreadable"])
    except Exception as error:  # the process is the plugin's: its answer may be anything
        return f"its answer cannot be read: {explain(error)}"


def to_json(brought: Brought) -> str:
    """What `ask_plugin.py` prints."""
    return json.dumps(asdict(brought))
