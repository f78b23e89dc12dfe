"""Discovery: which plugins there are, what they bring, and why a broken one is left out. No framework is imported here."""

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qkit.backend import Backend, BackendSpec
from qkit.errors import BackendError, RecipeError
from qkit.recipe import Recipe, read_recipe

if TYPE_CHECKING:  # `import qkit` stays cheap: discovery is paid for when something is looked up
    from importlib.resources.abc import Traversable
    from pathlib import Path

    from pluggy import PluginManager

GROUP = "qkit"

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
    """What discovery found."""

    backends: dict[str, BackendSpec] = field(default_factory=dict)
    recipes: "dict[str, Traversable]" = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can be used here, and if not, why."""

    name: str
    framework: str
    ready: bool
    reason: str = ""


@cache
def manager() -> "PluginManager":
    """The plugin manager, with every entry point that loads. Those that do not are in `plugins().broken`."""
    from importlib.metadata import entry_points

    from pluggy import PluginManager

    from qkit import hookspecs

    found = PluginManager(GROUP)
    found.add_hookspecs(hookspecs)
    for entry in entry_points(group=GROUP):
        try:
            found.register(entry.load(), name=entry.name)
        except Exception as error:  # a plugin may fail in any way; it disables only itself
            _broken_entries[entry.name] = f"{type(error).__name__}: {error}"
    return found


_broken_entries: dict[str, str] = {}


@cache
def plugins() -> Plugins:
    """The backends and recipes of all plugins, asked once.

    Raises:
        BackendError, RecipeError: two plugins bring one name.
    """
    from importlib.resources.abc import Traversable

    loaded = manager().list_name_plugin()  # first: it fills _broken_entries
    found = Plugins(broken=dict(_broken_entries))
    for name, plugin in loaded:
        for spec in _ask(found, name, plugin, "qkit_backends", wanted=BackendSpec):
            if spec.name in found.backends:
                raise BackendError(f"two plugins bring a backend {spec.name!r}: uninstall one ({name} is the second)")
            found.backends[spec.name] = spec
        for file in _ask(found, name, plugin, "qkit_recipes", wanted=Traversable):
            recipe_name = file.name.removesuffix(".toml")
            if recipe_name in found.recipes:
                raise RecipeError(f"two plugins bring a recipe {recipe_name!r}: uninstall one ({name} is the second)")
            found.recipes[recipe_name] = file
    return found


def _ask(found: Plugins, name: str, plugin: Any, hook: str, *, wanted: type) -> list[Any]:
    implementation = getattr(plugin, hook, None)
    if implementation is None:
        return []
    try:
        answer = list(implementation())
        for item in answer:
            if not isinstance(item, wanted):
                raise TypeError(f"gave {item!r}, not a {wanted.__name__}")
        return answer
    except Exception as error:  # as above: only the plugin that fails is left out
        found.broken[name] = f"{hook}: {type(error).__name__}: {error}"
        return []


#: The backends of the packages that `backend_of` has met; a plain look-up, so that it passes torch's compiler.
_by_package: dict[str, Backend] = {}


def register(plugin: object, name: str) -> None:
    """Adds a plugin by hand, for tests and notebooks; installed ones are found by themselves."""
    manager().register(plugin, name=name)
    plugins.cache_clear()
    _instance.cache_clear()
    _by_package.clear()


def unregister(name: str) -> None:
    """Takes back `register`."""
    manager().unregister(name=name)
    plugins.cache_clear()
    _instance.cache_clear()
    _by_package.clear()


# Backends


def backends() -> list[BackendStatus]:
    """Every backend and whether it can be used here. Looks for packages; imports none."""
    return [_status(spec) for spec in plugins().backends.values()] + [
        BackendStatus(name, "", ready=False, reason=f"plugin disabled: {reason}")
        for name, reason in plugins().broken.items()
    ]


def backend(choice: "str | Backend | None" = None) -> Backend:
    """The backend called `choice`; a backend object is given back.

    None takes what is at hand: MLX on a Mac, torch anywhere else, then any other that is ready, NumPy last.

    Raises:
        BackendError: there is no such backend, or its packages are missing.
    """
    if choice is not None and not isinstance(choice, str):
        return choice
    if choice is None:
        ready = {status.name for status in backends() if status.ready}
        liked = ("mlx", "torchao") if sys.platform == "darwin" else ("torchao", "mlx")
        choice = next(name for name in (*liked, *sorted(ready - {"numpy"}), "numpy") if name in ready)
    known = plugins().backends
    if choice not in known:
        reason = plugins().broken.get(choice)
        if reason:
            raise BackendError(f"backend {choice!r} is disabled: {reason}")
        raise BackendError(f"unknown backend {choice!r}: {_nearest(choice, known)}")
    return _instance(choice)


def backend_of(thing: Any) -> Backend:
    """The backend for an array or a module, by the package its type comes from.

    Raises:
        BackendError: no backend works on such a thing.
    """
    known = _by_package.get(type(thing).__module__.partition(".")[0])
    return known if known is not None else _search(thing)


def _search(thing: Any) -> Backend:
    packages = {cls.__module__.partition(".")[0] for cls in type(thing).__mro__}
    for spec in plugins().backends.values():
        if spec.framework in packages:
            return _by_package.setdefault(spec.framework, _instance(spec.name))
    raise BackendError(
        f"no backend works on {type(thing).__module__}.{type(thing).__qualname__}: there is "
        + ", ".join(f"{spec.name} for {spec.framework}" for spec in plugins().backends.values())
    )


@cache
def _instance(name: str) -> Backend:
    spec = plugins().backends[name]
    status = _status(spec)
    if not status.ready:
        raise BackendError(f"backend {name!r} {status.reason}")
    module, _, attribute = spec.target.partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
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
    """Names of the recipes that plugins bring, sorted."""
    return sorted(plugins().recipes)


def recipe(choice: "str | Path | Recipe") -> Recipe:
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
    known = plugins().recipes
    if name not in known:
        raise RecipeError(f"unknown recipe {choice!r}: {_nearest(choice, [*known, *ALIASES])}")
    return read_recipe(known[name])


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # here, so that `import qkit` stays cheap

    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is {', '.join(sorted(known))}"
