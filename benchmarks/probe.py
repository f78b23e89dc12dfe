"""Every recipe on every engine, tried: `qkit backends --probe` for benchmarks/results/, in all three types.

Usage: python benchmarks/probe.py [--backend NAME ...] [--device cpu|cuda|gpu] [--out FILE.json]
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from parity import machine

import qkit
from qkit.probe import probe
from qkit.qtensor import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    engines = [qkit.backend(name) for name in given.backend or [s.name for s in qkit.backends() if s.ready]]
    probes = []
    for engine in engines:
        if hasattr(engine, "layers"):
            for recipe in map(qkit.recipe, qkit.recipes()):
                for dtype in DTYPES:
                    probes += probe(engine.on(given.device), recipe, dtype=dtype, device=given.device)
    for one in probes:
        if not one.exact:
            print(one, file=sys.stderr)
    report = {
        "command": f"python {' '.join(sys.argv[: sys.argv.index('--out')] if given.out else sys.argv)}",
        "machine": machine(given.device),
    }
    rows = ",\n".join(f"    {json.dumps(asdict(one) | {'exact': one.exact})}" for one in probes)
    text = json.dumps(report | {"probes": []}, indent=2).replace('"probes": []', f'"probes": [\n{rows}\n  ]')
    given.out.write_text(text + "\n") if given.out else print(text)


if __name__ == "__main__":
    main()
