"""The plugin: one backend, described; `qkit_toy.backend` is imported when it is first used."""

from collections.abc import Iterable

from qkit import BackendSpec
from qkit.engines.hookspecs import hookimpl


@hookimpl
def qkit_backends() -> Iterable[BackendSpec]:
    """The toy backend."""
    return [BackendSpec("toy", "qkit_toy.backend:ToyBackend", framework="toyframe", install="pip install qkit-toy")]
