"""Words that a shell completes: names of recipes and of engines. Where none fits, the shell offers paths by itself."""

from pathlib import Path

import qkit
from qkit.engines.registry import ALIASES


def recipe_names(incomplete: str) -> list[str]:
    """The recipes, the aliases and the TOML files whose names begin with `incomplete`."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [str(file) for file in sorted(folder.glob("*.toml"))] if folder.is_dir() else []
    return [name for name in [*qkit.recipes(), *ALIASES, *files] if name.startswith(incomplete)]


def engine_names(incomplete: str) -> list[str]:
    """The engines whose names begin with `incomplete`, whether they are ready or not."""
    return [status.name for status in qkit.backends() if status.name.startswith(incomplete)]
