"""Where a report comes from: its command, versions, machine, text and recipes. No time of day: two runs are the same bytes."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import qkit
from qkit.report.findings import Comparison

PACKAGES = ("numpy", "torch", "torchao", "mlx", "mlx-lm", "transformers", "tokenizers", "ml_dtypes")


@dataclass(frozen=True, slots=True)
class About:
    """What a reader needs to make the report again.

    Attributes:
        tokens_per_byte: of the whole text.
    """

    command: str
    backend: str
    device: str
    versions: dict[str, str]
    machine: dict[str, str]
    files: tuple[str, ...]
    tokens_per_byte: float


def about(command: str, *, backend: str, device: str, files: Sequence[str], tokens_per_byte: float) -> About:
    """What this process knows of itself, and what it was told."""
    return About(
        command=command,
        backend=backend,
        device=device,
        versions={"qkit": qkit.__version__, "python": platform.python_version(), **_installed()},
        machine={"system": platform.system(), "processor": platform.machine()},
        files=tuple(files),
        tokens_per_byte=tokens_per_byte,
    )


def to_json(found: Comparison, source: About) -> str:
    """The content of report.json."""
    return json.dumps({"about": asdict(source), **asdict(found)}, indent=2) + "\n"


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
