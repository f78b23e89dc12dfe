"""Every engine against the reference, on every grid: `qkit parity --all`, kept with the machine it ran on.

Usage: python benchmarks/parity.py [--backend NAME ...] [--device cuda] [--eager] [--size N] [--out FILE.json]
"""

import argparse
import json
import os
import platform
import sys
import time
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
    gpu = ""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        gpu = sys.modules["torch"].cuda.get_device_name()
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu, **packages}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.backend or [status.name for status in qkit.backends() if status.ready]:
        for compiled in (False,) if given.eager or name == "numpy" else (False, True):
            engine, total, start = qkit.backend(name).on(given.device), Counter(), time.perf_counter()
            for dtype in DTYPES:
                for one in compare_many(engine, all_grids(), dtype=dtype, compiled=compiled, size=given.size):
                    total += Counter(codes=one.codes, scales=one.scales, values=one.values, compared=one.compared)
                    total["errors"] += bool(one.error)
                    if not one.exact:
                        print(one, file=sys.stderr, flush=True)
            row = {"backend": name, "device": given.device, "compiled": compiled, "grids": len(all_grids())}
            row["seconds"] = round(time.perf_counter() - start)
            rows.append(row | {key: total[key] for key in ("codes", "scales", "values", "errors", "compared")})
            print(rows[-1], file=sys.stderr, flush=True)
    text = json.dumps({"command": sys.argv, "machine": machine(), "dtypes": DTYPES, "mismatches": rows}, indent=2)
    given.out.write_text(text + "\n") if given.out else print(text)


if __name__ == "__main__":
    main()
