"""The origin of a report: its command, versions, machine and text. No time of day, so that two runs write the same bytes."""

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
    """All that a reader needs to repeat the report.

    Attributes:
        tokens_per_byte: tokens of the whole text over its bytes.
    """

    command: str
    backend: str
    device: str
    versions: dict[str, str]
    machine: dict[str, str]
    files: tuple[str, ...]
    tokens_per_byte: float


def describe_source(command: str, *, backend: str, device: str, files: Sequence[str], tokens_per_byte: float) -> About:
    """The origin of a report that this process makes: the arguments, and the versions and machine that it runs on."""
    return About(
        command=command,
        backend=backend,
        device=device,
        versions=installed(),
        machine={"system": platform.system(), "processor": platform.machine()},
        files=tuple(files),
        tokens_per_byte=tokens_per_byte,
    )


def to_json(found: Comparison, source: About) -> str:
    """The content of report.json."""
    return json.dumps({"about": asdict(source), **asdict(found)}, indent=2) + "\n"


def installed() -> dict[str, str]:
    """The versions of qkit, Python and the packages that a measurement depends on."""
    found = {"qkit": qkit.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
