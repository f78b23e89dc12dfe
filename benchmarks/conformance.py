"""The conformance suite of every engine, counted, with the machine it ran on; for benchmarks/results/.

Usage: python benchmarks/conformance.py [--device cpu|cuda|gpu] [--only SUITE ...] [--out FILE.json]

On a CUDA machine `TestTorchaoOnCuda` and, where MLX's CUDA build is installed, `TestMlx` run on the GPU.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from parity import machine

SUITES = Path(__file__).parent.parent / "tests" / "test_conformance.py"
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "--tb=short",
    "-o",
    "filterwarnings=default",
]  # other versions warn otherwise


class Count:
    """A pytest plugin that counts outcomes by suite and keeps the names of what failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test; its outcome is that of the call, or of the set-up that did not let it happen."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            suite = report.nodeid.split("::")[1]
            self.outcomes.setdefault(suite, Counter())[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid.partition("::")[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    count, start = Count(), time.perf_counter()
    chosen = [f"{SUITES}::{name}" for name in given.only] or [str(SUITES)]
    pytest.main([*OPTIONS, *chosen], plugins=[count])
    report = {
        "command": f"python {' '.join(sys.argv[: sys.argv.index('--out')] if given.out else sys.argv)}",
        "machine": machine(given.device),
        "suites": {name: dict(outcomes) for name, outcomes in count.outcomes.items() if name.startswith("Test")},
        "failed": count.failed,
        "seconds": round(time.perf_counter() - start),
    }
    text = json.dumps(report, indent=2)
    given.out.write_text(text + "\n") if given.out else print(text)


if __name__ == "__main__":
    main()
