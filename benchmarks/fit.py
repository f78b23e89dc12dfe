"""The share of rounding's KL divergence from the float model that fitted codes win back, in the same bytes.

A model of fit_model.py is calibrated on the files that it was trained on, for each seed on other windows, and measured on unseen
files. Share: 1 - KL of the fitted codes / KL of the rule's codes of the same recipe. Search without data has no seed.

Usage: python benchmarks/fit.py MODEL [--seeds N] [--drift-seeds N] [--windows N] [--length N] [--unseen N]
       [--recipe NAME ...] [--backend NAME] [--out FILE.json]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from fit_model import held_out
from measure import Report, spread
from numpy.typing import NDArray
from recover import texts

import qkit
from qkit.calibration import calibrate, calibrate_drift
from qkit.evaluation import evaluate
from qkit.fitting.fits import Fit
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

RECIPES = ("int4-g32", "int3-g32", "int2-g32", "mxfp4-a16", "nvfp4-a16")


class Bench:
    """One model, on an engine, and the windows that it is measured on."""

    def __init__(self, given: argparse.Namespace, place: Path) -> None:
        self.given, self.place, self.count = given, place, 0
        self.engine = qkit.backend(given.backend)
        self.teacher = qkit.load(given.model, backend=self.engine)
        self.rows = held_out(given.unseen, given.length)

    def statistics(self, seed: int) -> Path:
        """Statistics of windows that depend on the seed."""
        return calibrate(self.given.model, self.place / f"stats-{seed}", self.windows(seed), engine=self.engine)

    def corrected(self, seed: int, recipe: str) -> Path:
        """Statistics of the same windows that correct the drift of a recipe."""
        out, chosen = self.place / f"drift-{seed}-{recipe}", qkit.recipe(recipe)
        return calibrate_drift(self.given.model, out, self.windows(seed), engine=self.engine, recipe=chosen)

    def windows(self, seed: int) -> NDArray[np.int32]:
        """Windows of the text that the model was trained on."""
        text, length = texts()[0], self.given.length
        starts = np.random.default_rng(seed).integers(0, len(text) - length, self.given.windows)
        return text[starts[:, None] + np.arange(length)]

    def measure(self, recipe: str, how: Fit | None) -> tuple[float, float]:
        """Mean KL divergence from the float model, and the CPU seconds of quantizing."""
        self.count += 1
        out, begin = self.place / f"out-{self.count}", time.process_time()
        plan = make_plan(self.given.model, qkit.recipe(recipe), fit=how)
        quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
        seconds = time.process_time() - begin
        found = evaluate(self.engine, qkit.load(out, backend=self.engine), self.rows, teacher=self.teacher)
        assert found.kl is not None
        return float(found.kl.mean()), seconds


def main() -> int:
    """Measures every recipe and method, and reports a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name, value in (("seeds", 3), ("drift-seeds", 3), ("windows", 64), ("length", 256), ("unseen", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--backend", default="torchao")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    training = given.model / "training.json"
    about: dict[str, Any] = {"training": json.loads(training.read_text(encoding="utf-8"))} if training.exists() else {}
    report = Report(given.out, about=about)
    with TemporaryDirectory() as place:
        bench = Bench(given, Path(place))
        begin = time.process_time()
        stats = [bench.statistics(seed) for seed in range(given.seeds)]
        report.about["CPU seconds of a calibration"] = round((time.process_time() - begin) / given.seeds, 1)
        for recipe in given.recipe:
            rule, seconds = bench.measure(recipe, None)
            report.add({"recipe": recipe, "method": "rule", "KL": rule, "CPU seconds": round(seconds, 2)})
            tried = {"search, no data": [Fit("search")]}
            tried |= {method: [Fit(method, folder) for folder in stats] for method in ("search", "solve")}  # type: ignore[arg-type]
            if given.drift_seeds:
                tried["solve, drift"] = [Fit("solve", bench.corrected(n, recipe)) for n in range(given.drift_seeds)]
            for name, fits in tried.items():
                found = [bench.measure(recipe, how) for how in fits]
                shares = [100 * (1 - kl / rule) for kl, _ in found]
                took = spread([seconds for _, seconds in found], 2)
                report.add({"recipe": recipe, "method": name, "share": spread(shares, 1), "CPU seconds": took})
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
