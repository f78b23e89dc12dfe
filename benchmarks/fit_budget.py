"""The KL divergence of a mix of grids that `qkit plan --budget` chooses, over that of one grid for all layers of the same bytes.

A model of fit_model.py. Both are solved by the same statistics, of windows that depend on the seed, which the budget sees, too.

Usage: python benchmarks/fit_budget.py MODEL [--seeds N] [--windows N] [--length N] [--unseen N] [--uniform NAME]
       [--grids NAME ...] [--backend NAME] [--out FILE.json]
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fit import Bench
from measure import Report, spread

import qkit
from qkit.budget import Budget, allot
from qkit.fitting.fits import Fit
from qkit.rules import Recipe
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan


def measured(bench: Bench, recipe: Recipe, fit: Fit) -> tuple[float, int]:
    """Mean KL divergence from the float model, and the bytes of the quantized layers."""
    bench.count += 1
    out, plan = bench.place / f"mix-{bench.count}", make_plan(bench.given.model, recipe, fit=fit)
    quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    nbytes = sum(slot.nbytes for row in plan.rows if row.rule for slot in row.slots)
    return bench.divergence(qkit.load(out, backend=bench.engine)), nbytes


def main() -> int:
    """Measures both for each seed, and reports a row for each, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name, value in {"seeds": 3, "windows": 32, "length": 256, "unseen": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--uniform", default="int3-g32")
    parser.add_argument("--grids", nargs="+", default=["int2-g32", "int3-g32", "int4-g32"])
    parser.add_argument("--text", type=Path, help="as for fit.py")
    parser.add_argument("--backend", default="torchao")
    parser.add_argument("--device", help="of the engine; left out: the CPU")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report, ratios = Report(given.out), []
    with TemporaryDirectory() as place:
        bench = Bench(given, Path(place))
        for seed in range(given.seeds):
            fit = Fit("solve", bench.statistics(seed))
            uniform, most = measured(bench, qkit.recipe(given.uniform), fit)
            grids = [qkit.recipe(name) for name in given.grids]
            weight = next(rule.weight for rule in qkit.recipe(given.uniform).rules if rule.weight)
            budget = Budget(weight.element.bits + 16 / 32, "bpw")
            found = allot(given.model, grids, budget, bench.windows(seed), engine=bench.engine, fit=fit, seed=seed)
            mixed, nbytes = measured(bench, found.recipe, fit)
            ratios.append(mixed / uniform)
            report.add(
                {"seed": seed, "uniform KL": uniform, "bytes": most, "mixed KL": mixed, "bytes of the mix": nbytes}
            )
    report.add({"mixed / uniform": spread(ratios, 3)})
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
