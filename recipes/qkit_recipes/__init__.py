"""The recipes that come with qkit, as TOML files beside this one. `recipes/generate.py` writes them."""

from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable

from qkit.engines.hookspecs import hookimpl


@hookimpl
def qkit_recipes() -> Iterable[Traversable]:
    """Every TOML file of this package."""
    return [file for file in files(__name__).iterdir() if file.name.endswith(".toml")]
