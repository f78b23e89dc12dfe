"""What is installed that concerns qkit, by metadata alone: its own distribution, the remedies that name it, and its plugins."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import qkit` stays cheap
    from importlib.metadata import Distribution, EntryPoint

GROUP = "qkit"
SCRIPT = ("console_scripts", "qkit", "qkit.cli:main")  #: the entry point by which qkit knows its own distribution


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution that has plugins of qkit, or is qkit.

    Attributes:
        name: of the distribution, or nothing where its metadata is damaged.
        plugins: its entry points in the group `qkit`.
        own: whether it is qkit itself.
        broken: why its entry points cannot be read, or nothing.
    """

    name: str
    plugins: "tuple[EntryPoint, ...]" = ()
    own: bool = False
    broken: str = ""


def how_to_install(extra: str) -> str:
    """The command that adds an extra of qkit: `pip install 'NAME[EXTRA]'`. NAME comes from the metadata, it is not `qkit`.

    Without metadata, as in a source tree on PYTHONPATH, the answer names the extra only.
    """
    name = next((found.name for found in installed() if found.own), "")
    return f"pip install '{name}[{extra}]'" if name else f"install qkit with its extra {extra!r}"


@cache
def installed() -> list[Installed]:
    """Every distribution that concerns qkit, in the order of `sys.path`. Reads metadata; imports nothing of theirs."""
    from importlib.metadata import distributions

    return [found for distribution in distributions() if (found := _look(distribution))]


def _look(distribution: "Distribution") -> Installed | None:
    try:
        text = distribution.read_text("entry_points.txt")
    except (OSError, UnicodeDecodeError):
        return None  # nothing says that it has to do with qkit
    if not text or GROUP not in text:
        return None
    name = _name(distribution)
    try:
        entries = list(distribution.entry_points)
    except Exception as error:  # a line that is no entry point: the library's parser fails in several ways
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
