"""Discovery: the plugins, their backends and recipes, and why a broken one is left out. No framework is imported here."""

from __future__ import annotations  # the protocols are for the type checker: `import qkit` stays cheap

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qkit.errors import BackendError, QkitError, RecipeError
from qkit.rules import Recipe, parse_recipe, read_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from qkit.engines.discovery import Brought
    from qkit.engines.protocol import Arrays, BackendSpec

#: Other tools' names for grids that are ours too. They resolve, and say to what.
ALIASES = {
    "W4A16": "int4-g128-midmax",
    "W4A16_ASYM": "int4-g128-minmax",
    "W8A16": "int8-g128-midmax",
    "MXFP4A16": "mxfp4-a16-even",
    "MXFP8A16": "mxfp8-a16",
    "NVFP4A16": "nvfp4-a16",
}

#: How the codes of an alias differ from those of compressed-tensors 0.20, measured by `benchmarks/peers.py`; see numerics.md.
DIFFERENCES = {
    "W4A16": "0.5 % of codes differ from compressed-tensors' for float32 weights and 0.6 % for bfloat16, by other rounding",
    "W4A16_ASYM": "1.2 % of codes differ from compressed-tensors' for float32 weights and 3.1 % for bfloat16, by other rounding",
    "W8A16": "4.7 % of codes differ from compressed-tensors' for float32 weights and 10.1 % for bfloat16, by other rounding",
    "MXFP4A16": "equal to compressed-tensors' codes",
    "MXFP8A16": "equal to compressed-tensors' codes for float32 weights; 0.6 % differ for bfloat16, by another scale",
    "NVFP4A16": "7 % of codes differ from compressed-tensors', whose scale of the tensor is no power of two",
}


@dataclass(slots=True)
class Plugins:
    """What discovery found.

    Attributes:
        recipes: the text of each recipe by its name.
        broken: why a plugin is left out, by its label.
        unreadable: why a recipe is left out, by its name.
    """

    backends: dict[str, BackendSpec] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, label: str, brought: Brought | str) -> None:
        """Takes in the backends and recipes of a plugin. A plugin with a name that is taken is left out, not the first one."""
        reason = brought if isinstance(brought, str) else self._clash(brought)
        if isinstance(brought, str) or reason:
            self.broken[label] = reason
            return
        self.backends |= {spec.name: spec for spec in brought.backends}
        self.recipes |= brought.recipes
        self.unreadable |= brought.unreadable

    def _clash(self, brought: Brought) -> str:
        for spec in brought.backends:
            if spec.name in self.backends:
                return f"it brings a backend {spec.name!r}, which is there already: uninstall one"
        for name in (*brought.recipes, *brought.unreadable):
            if name in ALIASES:
                return f"it brings a recipe {name!r}, which is an alias of {ALIASES[name]}"
            if name in self.recipes:
                return f"it brings a recipe {name!r}, which is there already: uninstall one"
        return ""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can be used here, and if not, why."""

    name: str
    framework: str
    ready: bool
    reason: str = ""


@cache
def own() -> Plugins:
    """What qkit itself brings, and plugins that are registered by hand. No third party's code is touched."""
    from qkit.engines import discovery  # here, so that `import qkit` stays cheap

    found = Plugins()
    for entry in discovery.own_plugins():
        found.add(entry.name, _ask(entry.load))
    for name in _registered:
        found.add(name, _ask(partial(_registered.__getitem__, name)))
    return found


@cache
def plugins() -> Plugins:
    """What all plugins bring. Third parties' are asked in processes of their own, once: for listings and unknown names."""
    from qkit.engines import discovery  # here, so that `import qkit` stays cheap

    mine = own()
    found = Plugins(dict(mine.backends), dict(mine.recipes), dict(mine.broken), dict(mine.unreadable))
    entries, found_broken = discovery.foreign_plugins()
    found.broken |= found_broken
    for label, brought in discovery.ask_all(entries).items():
        found.add(label, brought)
    return found


def _ask(load: Callable[[], object]) -> Brought | str:
    from qkit.engines import discovery

    try:
        return discovery.ask(load())
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; it disables only itself
        return discovery.explain(error)


_registered: dict[str, object] = {}  #: plugins that are registered by hand

#: The backends of the packages that `backend_of` has met; a plain look-up, so that it passes torch's compiler.
_by_package: dict[str, Arrays] = {}


def register(plugin: object, name: str) -> None:
    """Adds a plugin by hand, for tests and notebooks; installed ones are found by themselves."""
    _registered[name] = plugin
    forget()


def unregister(name: str) -> None:
    """Takes back `register`."""
    del _registered[name]
    forget()


def forget() -> None:
    """Forgets the answers of plugins: the next look-up asks again."""
    for cached in (own, plugins, _readable, _instance):
        cached.cache_clear()
    _by_package.clear()


# Backends


def backends() -> list[BackendStatus]:
    """Every backend and whether it can be used here. Looks for packages; imports none.

    A plugin that is left out is a row, too, under its own name, with the reason.
    """
    return [_status(spec) for spec in plugins().backends.values()] + [
        BackendStatus(name, "", ready=False, reason=f"plugin disabled: {reason}")
        for name, reason in plugins().broken.items()
    ]


def backend(choice: str | Arrays | None = None) -> Arrays:
    """The backend called `choice`; a backend object is given back.

    None takes the first that is ready: MLX on a Mac, torch anywhere else, then any other that is ready, NumPy last.

    Raises:
        BackendError: there is no such backend, or its packages are missing.
    """
    if choice is not None and not isinstance(choice, str):
        return choice
    if choice is None:
        choice = _at_hand()
    if choice not in own().backends and choice not in plugins().backends:
        reason = plugins().broken.get(choice)
        if reason:
            raise BackendError(f"backend {choice!r} is disabled: {reason}")
        raise BackendError(f"unknown backend {choice!r}: {_nearest(choice, plugins().backends)}")
    return _instance(choice)


def _at_hand() -> str:
    liked = ("mlx", "torchao") if sys.platform == "darwin" else ("torchao", "mlx")
    for name in liked:
        if name in own().backends and _status(own().backends[name]).ready:
            return name
    ready = {status.name for status in backends() if status.ready}
    return next((name for name in sorted(ready - {"numpy"})), "numpy")


def backend_of(thing: Any) -> Arrays:
    """The backend for an array or a module, by the package its type comes from.

    Raises:
        BackendError: no backend works on such a thing.
    """
    known = _by_package.get(type(thing).__module__.partition(".")[0])
    return known if known is not None else _search(thing)


def _search(thing: Any) -> Arrays:
    packages = {cls.__module__.partition(".")[0] for cls in type(thing).__mro__}
    for found in (own, plugins):  # third parties are asked only where qkit has no backend for it
        for spec in found().backends.values():
            if spec.framework in packages:
                return _by_package.setdefault(spec.framework, _instance(spec.name))
    raise BackendError(
        f"no backend works on {type(thing).__module__}.{type(thing).__qualname__}: there is "
        + ", ".join(f"{spec.name} for {spec.framework}" for spec in plugins().backends.values())
    )


@cache
def _instance(name: str) -> Arrays:
    spec = own().backends.get(name) or plugins().backends[name]
    status = _status(spec)
    if not status.ready:
        raise BackendError(f"backend {name!r} {status.reason}")
    module, _, attribute = spec.target.partition(":")
    from qkit.engines import discovery

    try:
        made: Arrays = getattr(importlib.import_module(module), attribute)()
    except (Exception, SystemExit) as error:
        raise BackendError(
            f"backend {name!r} cannot be loaded from {spec.target}: {discovery.explain(error)}"
        ) from error
    return made


def _status(spec: BackendSpec) -> BackendStatus:
    missing = [package for package in (spec.framework, *spec.requires) if not _installed(package)]
    reason = f"needs {' and '.join(missing)}: {spec.install}" if missing else ""
    return BackendStatus(spec.name, spec.framework, ready=not missing, reason=reason)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


# Recipes


def recipes() -> list[str]:
    """Names of the recipes that plugins bring, sorted. One that cannot be read is left out, see `left_out`."""
    return sorted(_readable()[0])


def left_out() -> dict[str, str]:
    """Why a plugin or a recipe is left out, by its name."""
    return {**plugins().broken, **_readable()[1]}


@cache
def _readable() -> tuple[dict[str, Recipe], dict[str, str]]:
    found: dict[str, Recipe] = {}
    broken = dict(plugins().unreadable)
    for name, text in plugins().recipes.items():
        try:
            found[name] = parse_recipe(text, name=name, source=name)
        except QkitError as error:
            broken[name] = str(error)
    return found, broken


def recipe(choice: str | Path | Recipe) -> Recipe:
    """A recipe by name, by alias, by path of a TOML file, or itself.

    Raises:
        RecipeError: there is none, or its file is malformed.
    """
    if isinstance(choice, Recipe):
        return choice
    if not isinstance(choice, (str, os.PathLike)):
        raise RecipeError(f"{choice!r} is no recipe: give a name, a path of a TOML file, or a qkit.Recipe")
    if not isinstance(choice, str) or choice.endswith(".toml"):
        from pathlib import Path

        return read_recipe(Path(choice))
    name = ALIASES.get(choice, choice)
    for found in (own, plugins):  # third parties are asked only for a recipe that qkit does not have
        if name in found().recipes:
            return parse_recipe(found().recipes[name], name=name, source=name)
    if name in plugins().unreadable:
        raise RecipeError(f"recipe {name!r} cannot be read: {plugins().unreadable[name]}")
    raise RecipeError(f"unknown recipe {choice!r}: {_nearest(choice, [*plugins().recipes, *ALIASES])}")


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # here, so that `import qkit` stays cheap

    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is {', '.join(sorted(known))}"
