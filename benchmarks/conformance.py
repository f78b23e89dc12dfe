"""The conformance suite of every engine, counted, with the machine it ran on; for benchmarks/results/.

Usage: python benchmarks/conformance.py [--device cpu|cuda|gpu] [--only SUITE ...] [--jobs N] [--out FILE.json]

On a CUDA machine `TestTorchaoOnCuda` and, where MLX's CUDA build is installed, `TestMlx` run on the GPU.
"""

import argparse
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from measure import Report

SUITES = Path(__file__).parent.parent / "tests" / "engines" / "any" / "test_conformance.py"
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "--tb=short",
    "-o",
    "filterwarnings=default",
]  # other versions warn otherwise


class Count:
    """A pytest plugin that runs every `jobs`-th test, counts outcomes by suite and keeps the names of what failed."""

    def __init__(self, first: int, jobs: int) -> None:
        self.share = slice(first, None, jobs)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps this process's share."""
        items[:] = items[self.share]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test; its outcome is that of the call, or of the set-up that did not let it happen."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self.outcomes[report.nodeid.split("::")[1], report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid.partition("::")[2])


def work(task: tuple[int, int, list[str]]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """One process's share."""
    first, jobs, chosen = task
    count = Count(first, jobs)
    pytest.main([*OPTIONS, *chosen], plugins=[count])
    return count.outcomes, count.failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start, outcomes, failed = time.perf_counter(), Counter(), []
    chosen = [f"{SUITES}::{name}" for name in given.only] or [str(SUITES)]
    tasks = [(first, given.jobs, chosen) for first in range(given.jobs)]
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for some, names in pool.map(work, tasks):
            outcomes += some
            failed += names
    suites = sorted({suite for suite, _ in outcomes if suite.startswith("Test")})
    report = Report(given.out, device=given.device, about={"seconds": round(time.perf_counter() - start)})
    for name in suites:
        counts = {kind: n for (suite, kind), n in outcomes.items() if suite == name}
        report.add({"suite": name, **counts, "failures": [one for one in failed if one.startswith(f"{name}::")]})
    report.finish()


if __name__ == "__main__":
    main()
