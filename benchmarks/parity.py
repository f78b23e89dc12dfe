"""Every engine against the reference, on every grid: `qkit parity --all`, kept with the machine it ran on.

Usage: python benchmarks/parity.py [FILE]     FILE: where the JSON goes; standard output, if left out
"""

import json
import os
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import qkit
from qkit.parity import compare_many
from qkit.qtensor import DTYPES
from qkit.testing.tensors import all_grids


def machine() -> dict[str, object]:
    """What this ran on."""
    packages = {}
    for name in ("numpy", "torch", "torchao", "mlx", "ml_dtypes"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "packages": packages}


def main() -> None:
    rows = []
    for status in qkit.backends():
        for compiled in (False, True) if status.ready and status.name != "numpy" else (False,):
            if not status.ready:
                continue
            engine, total = qkit.backend(status.name), Counter()
            for dtype in DTYPES:
                for one in compare_many(engine, all_grids(), dtype=dtype, compiled=compiled, size=16384):
                    total += Counter(codes=one.codes, scales=one.scales, values=one.values, compared=one.compared)
                    total["errors"] += bool(one.error)
            row = {"backend": status.name, "compiled": compiled, "grids": len(all_grids())}
            rows.append(row | {key: total[key] for key in ("codes", "scales", "values", "errors", "compared")})
            print(rows[-1], file=sys.stderr, flush=True)
    text = json.dumps({"machine": machine(), "dtypes": DTYPES, "mismatches": rows}, indent=2)
    Path(sys.argv[1]).write_text(text + "\n") if len(sys.argv) > 1 else print(text)


if __name__ == "__main__":
    main()
