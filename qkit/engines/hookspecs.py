"""The two hooks of a qkit plugin. Both only describe: nothing is computed and nothing heavy is imported in them."""

from collections.abc import Iterable
from importlib.resources.abc import Traversable

import pluggy

from qkit.engines.protocol import BackendSpec

hookspec = pluggy.HookspecMarker("qkit")
hookimpl = pluggy.HookimplMarker("qkit")


@hookspec
def qkit_backends() -> Iterable[BackendSpec]:
    """The backends this plugin brings."""
    raise AssertionError("a specification is not called")


@hookspec
def qkit_recipes() -> Iterable[Traversable]:
    """The recipe files (`NAME.toml`) this plugin brings."""
    raise AssertionError("a specification is not called")
