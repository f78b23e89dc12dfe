"""The installed distributions that concern qkit, from metadata alone: qkit itself and its plugins."""

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import qkit` stays cheap
    from importlib.metadata import Distribution, EntryPoint

GROUP = "qkit"
SCRIPT = ("console_scripts", "qkit", "qkit.cli:main")  #: the entry point by which qkit knows its own distribution

#: The extras of the usual engine of this platform: one that runs models, and one that fine-tunes them by other libraries, too.
ENGINE, TUNING = ("mac", "train-mlx") if sys.platform == "darwin" else ("cuda", "train-torch")


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution that is qkit, or has plugins for it.

    Attributes:
        name: name of the distribution; empty where its metadata are damaged.
        plugins: its entry points in the group `qkit`.
        own: whether the distribution is qkit itself.
        broken: reason why its entry points cannot be read; empty where they can.
    """

    name: str
    plugins: "tuple[EntryPoint, ...]" = ()
    own: bool = False
    broken: str = ""


def how_to_install(extra: str) -> str:
    """The command that adds an extra of qkit: `pip install 'NAME[EXTRA]'`, where NAME is the distribution's own.

    Without metadata, as in a source tree on PYTHONPATH, the text names the extra only.
    """
    name = next((found.name for found in installed() if found.own), "")
    return f"pip install '{name}[{extra}]'" if name else f"install qkit with its extra {extra!r}"


@cache
def installed() -> list[Installed]:
    """Every distribution that concerns qkit, in the order of `sys.path`. Reads metadata, and imports no distribution."""
    from importlib.metadata import distributions

    return [found for distribution in distributions() if (found := _look(distribution))]


def _look(distribution: "Distribution") -> Installed | None:
    try:
        text = distribution.read_text("entry_points.txt")
    except (OSError, UnicodeDecodeError):
        return None  # no entry point names qkit
    if not text or GROUP not in text:
        return None
    name = _name(distribution)
    try:
        entries = list(distribution.entry_points)
    except Exception as error:  # the library's parser fails in several ways
        broken = f"its entry_points.txt is malformed ({type(error).__name__}: {error}): install it again"
        return Installed(name, broken=broken) if f"[{GROUP}]" in text else None
    plugins = tuple(entry for entry in entries if entry.group == GROUP)
    own = any((entry.group, entry.name, entry.value) == SCRIPT for entry in entries)
    return Installed(name, plugins, own) if plugins or own else None


def _name(distribution: "Distribution") -> str:
    try:
        return distribution.metadata["Name"] or ""
    except Exception:  # damaged metadata: the library's parser fails in several ways
        return ""
