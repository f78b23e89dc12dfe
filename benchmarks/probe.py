"""Every recipe on every engine, tried: `qkit backends --probe` for benchmarks/results/, in all three types.

Usage: python benchmarks/probe.py [--backend NAME ...] [--device cpu|cuda|gpu] [--jobs N] [--out FILE.json]
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from measure import Report

import qkit
from qkit.engines.abilities import offers
from qkit.engines.protocol import Modules
from qkit.qtensor import DTYPES
from qkit.testing.probe import Probe, probe


def work(task: tuple[str, str, str]) -> list[Probe]:
    """One process's share."""
    name, device, recipe = task
    engine = qkit.backend(name).on(device)
    return [one for dtype in DTYPES for one in probe(engine, qkit.recipe(recipe), dtype=dtype, device=device)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ready = [status.name for status in qkit.backends() if status.ready]
    names = [name for name in given.backend or ready if offers(qkit.backend(name), Modules)]
    tasks = [(name, given.device, recipe) for name in names for recipe in qkit.recipes()]
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        probes = [one for some in pool.map(work, tasks) for one in some]
    for one in probes:
        if not one.exact:
            print(one, file=sys.stderr)
    report = Report(given.out, device=given.device)
    report.rows = [asdict(one) | {"exact": one.exact} for one in probes]
    report.finish()


if __name__ == "__main__":
    main()
