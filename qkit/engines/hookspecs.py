"""The two hooks of a qkit plugin. Both only describe: they compute nothing and import nothing heavy."""

from collections.abc import Iterable
from importlib.resources.abc import Traversable

import pluggy

from qkit.engines.protocol import BackendSpec

hookspec = pluggy.HookspecMarker("qkit")
hookimpl = pluggy.HookimplMarker("qkit")


@hookspec
def qkit_backends() -> Iterable[BackendSpec]:
    """The backends of this plugin."""
    raise AssertionError("a specification is not called")


@hookspec
def qkit_recipes() -> Iterable[Traversable]:
    """The recipe files (`NAME.toml`) of this plugin."""
    raise AssertionError("a specification is not called")
