"""Every engine against the reference, kept with the machine it ran on: `qkit parity --all` for benchmarks/results/.

Usage: python benchmarks/parity.py [--backend NAME ...] [--device cuda] [--mode eager|compiled ...] [--dtype NAME ...]
                                   [--one-group] [--size N] [--jobs N] [--out FILE.json]

--one-group keeps one group size for each element and rule (code that is compiled is the same for the others); --jobs runs in as
many processes, which is what compiling on a GPU machine needs.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from measure import Report

import qkit
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.testing.hard_tensors import all_grids
from qkit.testing.parity import BATCH, Parity, compare_many

Task = tuple[str, str, bool, DType, list[Grid], int]


def one_group(grids: list[Grid]) -> list[Grid]:
    """One grid for each element and rule."""
    return [grid for grid in grids if grid.group == {"integer": 64, "float": 32}[grid.element.kind] or grid.group == 16]


def work(task: Task) -> list[Parity]:
    """One process's share."""
    name, device, compiled, dtype, grids, size = task
    return list(compare_many(qkit.backend(name).on(device), grids, dtype=dtype, compiled=compiled, size=size))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", action="append", choices=("eager", "compiled"), default=[])
    parser.add_argument("--dtype", action="append", choices=DTYPES, default=[])
    parser.add_argument("--one-group", action="store_true")
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    grids = one_group(all_grids()) if given.one_group else all_grids()
    dtypes = given.dtype or list(DTYPES)
    report = Report(given.out, device=given.device)
    for name in given.backend or [status.name for status in qkit.backends() if status.ready]:
        for mode in given.mode or ["eager", "compiled"]:
            if (name, mode) == ("numpy", "compiled"):
                continue
            start, total = time.perf_counter(), Counter()
            few = BATCH if given.device == "cpu" else 1  # on a GPU, compiling takes the time
            tasks: list[Task] = [
                (name, given.device, mode == "compiled", dtype, grids[i : i + few], given.size)
                for dtype in dtypes
                for i in range(0, len(grids), few)
            ]
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
                for results in pool.map(work, tasks):
                    for one in results:
                        total.update(codes=one.codes, scales=one.scales, values=one.values, compared=one.compared)
                        total["not run"] += bool(one.error)
                        if not one.exact:
                            print(one, file=sys.stderr, flush=True)
            row = {"backend": name, "device": given.device, "mode": mode, "dtypes": dtypes, "grids": len(grids)}
            row |= {key: total[key] for key in ("codes", "scales", "values", "not run", "compared")}
            report.add(row | {"seconds": round(time.perf_counter() - start)})
    report.finish()


if __name__ == "__main__":
    main()
