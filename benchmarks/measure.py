"""The one way in which benchmarks take turns, sum up repeats, and write their result: results/<machine>/<script>.json.

A result is one JSON object: `command`, `machine`, `versions`, `about` (whatever holds for every row), `note` and `rows`.
README.md describes it.
"""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "ml_dtypes", "torch", "torchao", "mlx", "mlx-cuda-13")
Row = dict[str, Any]


def in_turn(jobs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The figures that each job returned, by its name: `repeats` turns, backwards and forwards, with no warming up."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name in list(jobs)[:: 1 if repeat % 2 else -1]:
            found[name].append(jobs[name]())
    return found


def spread(values: Sequence[float], digits: int = 4) -> Row:
    """Median, least and greatest, in the unit of `values`."""
    ends = [round(bound, digits) for bound in (min(values), max(values))]
    return {"median": round(statistics.median(values), digits), "spread": ends}


def relative(values: Sequence[float], digits: int = 4) -> Row:
    """Median; and least and greatest as shares of it."""
    median = statistics.median(values)
    return {"median": round(median, digits), "spread / median": [round(end(values) / median, 3) for end in (min, max)]}


def quartiles(values: Sequence[float], digits: int = 3) -> Row:
    """Median and quartiles, in the unit of `values`."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    ends = [round(ordered[quarter], digits), round(ordered[-1 - quarter], digits)]
    return {"median": round(statistics.median(values), digits), "quartiles": ends}


class Report:
    """The rows of one run: each is printed when it is there, and the file, if one is wanted, holds those so far."""

    def __init__(
        self, out: Path | None, *, device: str = "cpu", packages: Iterable[str] = (), about: Row | None = None
    ) -> None:
        self.out, self.about, self.command = out, about or {}, command()
        self.machine, self.versions = machine(device), versions((*PACKAGES, *packages))
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Prints a row and writes the file anew."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file, where one is wanted."""
        if self.out:
            self.out.write_text(self.text() + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Writes the file; without one, prints its text."""
        self.write()
        if not self.out:
            print(self.text())

    def text(self) -> str:
        """The result as JSON, with a line for each row."""
        head = {"command": self.command, "machine": self.machine, "versions": self.versions, "about": self.about}
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.rows)
        empty = json.dumps({**head, "note": "", "rows": []}, indent=2)
        return empty.replace('"rows": []', f'"rows": [\n{rows}\n  ]') if rows else empty


def command() -> str:
    """The command line, without the file that it writes."""
    words = list(sys.argv)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return f"python {shlex.join(words)}"


def machine(device: str = "cpu") -> Row:
    """The processor, its cores, and the GPU if `device` is one: `cuda` of torch or `gpu` of MLX."""
    about: Row = {"processor": _processor(), "cores": os.cpu_count()}
    if device == "cuda":
        import torch

        about["gpu"] = torch.cuda.get_device_name()
    elif device == "gpu":
        import mlx.core as mx

        about["gpu"] = mx.device_info()["device_name"]
    return about


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of Python and of each of `packages` that is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
