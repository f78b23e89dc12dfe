"""The share of rounding's KL divergence from the float model that fitted codes win back, in the same bytes.

A model of fit_model.py is calibrated on the files that it was trained on, for each seed on other windows, and measured on unseen
files. Share: 1 - KL of the fitted codes / KL of the rule's codes of the same recipe. Search without data has no seed.

With `--keep`, each measurement lies in a file of FOLDER: the same command goes on where it was, and several share the work.

Usage: python benchmarks/fit.py MODEL [--keep FOLDER] [--seeds N] [--drift-seeds N] [--windows N] [--length N] [--unseen N]
       [--recipe NAME ...] [--learn NAME ...] [--steps N] [--train NAME ...] [--train-steps N] [--environments FOLDER]
       [--peer NAME ...] [--peer-seeds N] [--method NAME ...] [--text FILE.npz] [--backend NAME] [--device NAME] [--workers N]
       [--out FILE.json]

`--text` has the bytes `text` and `unseen` of such files as arrays, where another Python runs than the one of the training. With
`--device`, the engine runs models there, and solves there; search takes processes of the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from measure import Report, spread
from numpy.typing import NDArray
from recover import texts
from safetensors.numpy import load_file

import qkit
from qkit.calibration import calibrate
from qkit.drift_calibration import calibrate_drift
from qkit.engines.blocks import Lesson
from qkit.evaluation import consecutive
from qkit.fitting.fits import Fit, Method
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan
from qkit.training import run_from_table, train_model

RECIPES = ("int4-g32", "int3-g32", "int2-g32", "mxfp4-a16", "nvfp4-a16")
ENVIRONMENTS = {
    "llm-compressor RTN": "llmc",
    "llm-compressor GPTQ": "llmc",
    "AutoRound 200": "autoround",
    "mlx-lm gptq": "mlx-lm",
    "GPTQModel": "gptq",
}
METHODS: tuple[Method, ...] = ("search", "solve")
RATES = {
    "int4-g32": 2e-5,
    "int2-g32": 3e-4,
}  #: of scales that train: the better of two, on seed 0's model and unseen text
LACKS = {
    "AutoRound 200": ("int3-g32", "nvfp4-a16"),
    "mlx-lm gptq": ("int3-g32", "mxfp4-a16", "nvfp4-a16"),
    "GPTQModel": ("mxfp4-a16", "nvfp4-a16"),
}


Measure = Callable[[], tuple[float, float]]  #: the mean KL divergence of a model from the float one, and CPU seconds


def takes(peer: str, recipe: str) -> bool:
    """Whether another program has the grid of a recipe."""
    return recipe not in LACKS.get(peer, ())


class Bench:
    """One model, on an engine, and the windows that it is measured on."""

    def __init__(self, given: argparse.Namespace, place: Path) -> None:
        self.given, self.place, self.count = given, place, 0
        self.engine = qkit.backend(given.backend).on(given.device) if given.device else qkit.backend(given.backend)
        self.teacher = qkit.load(given.model, backend=self.engine)
        self.text, unseen = read_texts(given.text)
        self.rows = consecutive(unseen, length=given.length, windows=given.unseen)
        self.wanted = self.log_probabilities(self.teacher)

    def fitted(self, recipe: str, method: Method, seed: int) -> tuple[float, float]:
        """As `measure`, by statistics of windows that depend on the seed."""
        return self.measure(recipe, Fit(method, self.statistics(seed)))

    def statistics(self, seed: int) -> Path:
        """Statistics of windows that depend on the seed."""
        stats = self.place / f"stats-{seed}"
        if not stats.exists():
            calibrate(self.given.model, stats, self.windows(seed), engine=self.engine)
        return stats

    def made(self, recipe: str, seed: int, lesson: Lesson | None) -> tuple[float, float]:
        """As `measure`, with corrected drift, and learned rounding where there is a lesson; its time is in the seconds."""
        out, begin = self.place / f"made-{self.count}", time.process_time()
        calibrate_drift(
            self.given.model, out, self.windows(seed), engine=self.engine, recipe=qkit.recipe(recipe), lesson=lesson
        )
        seconds = time.process_time() - begin
        kl, more = self.measure(recipe, Fit("round" if lesson else "solve", out))
        return kl, seconds + more

    def trained(self, recipe: str, seed: int) -> tuple[float, float]:
        """As `made`, whose scales then train while the codes stay, by `qkit train --freeze-codes` and the float model."""
        text, out, begin = self.place / "text.txt", self.place / f"trained-{self.count}", time.process_time()
        text.write_text(bytes(self.text.astype(np.uint8)).decode("utf-8", "ignore"), encoding="utf-8")
        self.made(recipe, seed, None)
        run = {
            "model": str(self.given.model),
            "init": str(self.place / f"out-{self.count}"),
            "out": str(out),
            "data": [str(text)],
            "freeze_codes": True,
            "steps": self.given.train_steps,
            "length": self.given.length,
            "learning_rate": RATES[recipe],
            "schedule": "cosine",
            "seed": seed,
            "backend": self.engine.name,
            "distillation": {"teacher": str(self.given.model)},
        }
        train_model(run_from_table(run | ({"device": self.given.device} if self.given.device else {})))
        return self.divergence(qkit.load(out, backend=self.engine)), time.process_time() - begin

    def kept(self, name: str, measure: Measure) -> tuple[float, float]:
        """A measurement, from its file where it was taken before."""
        if self.given.keep is None:
            return measure()
        file = self.given.keep / f"{name.replace(' ', '-')}-{self.given.windows}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            kl, seconds = measure()
            file.write_text(json.dumps([kl, seconds]), encoding="utf-8")
        kl, seconds = json.loads(file.read_text(encoding="utf-8"))
        return kl, seconds

    def log_probabilities(self, model: Any) -> NDArray[np.float64]:
        """Of a model on the unseen windows, [windows, length, vocabulary]."""
        blocks = np.array_split(self.rows[:, :-1], -(-len(self.rows) // 8))
        scores = np.concatenate([self.engine.logits(model, block) for block in blocks]).astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

    def divergence(self, model: Any) -> float:
        """Mean KL divergence of the float model from `model`."""
        return float((np.exp(self.wanted) * (self.wanted - self.log_probabilities(model))).sum(axis=-1).mean())

    def windows(self, seed: int) -> NDArray[np.int32]:
        """Windows of the text that the model was trained on."""
        text, length = self.text, self.given.length
        starts = np.random.default_rng(seed).integers(0, len(text) - length, self.given.windows)
        return text[starts[:, None] + np.arange(length)]

    def measure(self, recipe: str, how: Fit | None) -> tuple[float, float]:
        """Mean KL divergence from the float model, and the CPU seconds of quantizing."""
        self.count += 1
        out, begin = self.place / f"out-{self.count}", time.process_time()
        plan = make_plan(self.given.model, qkit.recipe(recipe), fit=how)
        solver = self.engine if self.given.device and how and how.method == "solve" else qkit.backend("numpy")
        quantize_directory(plan, out, engine=solver, workers=self.given.workers, tick=lambda *_: None)
        seconds = time.process_time() - begin
        return self.divergence(qkit.load(out, backend=self.engine)), seconds

    def peer(self, name: str, recipe: str, seed: int) -> tuple[float, float]:
        """As `measure`, of another program in its own environment, on the same windows as ours."""
        windows, out = self.place / "windows.npy", self.place / "peer.safetensors"
        np.save(windows, self.windows(seed))
        words = [Path(__file__).with_name("fit_peers.py"), name, self.given.model, windows, recipe, out]
        python = self.given.environments / ENVIRONMENTS[name] / "bin" / "python"
        quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "USE_HUB_KERNELS": "0"}
        done = subprocess.run([python, "-P", *words], env=quiet, capture_output=True, text=True, check=True)
        model = qkit.load(self.given.model, backend=self.engine)
        blocks = self.engine.blocks(model, length=self.given.length)
        for path, values in load_file(out).items():
            blocks.put(path.removesuffix(".weight"), values)
        return self.divergence(model), float(json.loads(done.stdout.splitlines()[-1])["CPU seconds"])


def main() -> int:
    """Measures every recipe and method, and reports a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    whole = {
        "seeds": 3,
        "drift-seeds": 3,
        "peer-seeds": 3,
        "windows": 64,
        "length": 256,
        "unseen": 40,
        "steps": Lesson().steps,
        "train-steps": 100,
    }
    for name, value in whole.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learn", nargs="*", default=["int4-g32", "int2-g32"], help="recipes that learn rounding")
    parser.add_argument(
        "--train", nargs="*", default=list(RATES), choices=list(RATES), help="recipes whose scales train"
    )
    parser.add_argument("--environments", type=Path, help="folder of environments: llmc, autoround, mlx-lm, gptq")
    parser.add_argument("--peer", nargs="*", default=list(ENVIRONMENTS))
    parser.add_argument("--method", nargs="*", help="of qkit: those to measure; by default all")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--backend", default="torchao")
    parser.add_argument("--device", help="of the engine; left out: the CPU")
    parser.add_argument("--workers", type=int, default=1, help="processes that search")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    training = given.model / "training.json"
    about: dict[str, Any] = {"training": json.loads(training.read_text(encoding="utf-8"))} if training.exists() else {}
    report = Report(given.out, device=given.device or "cpu", about=about)
    with TemporaryDirectory() as place:
        bench = Bench(given, Path(place))
        for recipe in given.recipe:
            rule, seconds = bench.measure(recipe, None)
            report.add({"recipe": recipe, "method": "rule", "KL": rule, "CPU seconds": round(seconds, 2)})
            for name, found in taken(bench, recipe, tried(bench, recipe)).items():
                shares = [100 * (1 - kl / rule) for kl, _ in found]
                took = spread([seconds for _, seconds in found], 2)
                kls = spread([kl for kl, _ in found], 6)
                report.add(
                    {
                        "recipe": recipe,
                        "method": name,
                        "seeds": len(found),
                        "windows": given.windows,
                        "share": spread(shares, 1),
                        "KL": kls,
                        "CPU seconds": took,
                    }
                )
    report.finish()
    return 0


def taken(bench: Bench, recipe: str, methods: dict[str, list[Measure]]) -> dict[str, list[tuple[float, float]]]:
    """The measurements of each method, turn by turn: every method with the first seed, then with the second."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for seed in range(max((len(measures) for measures in methods.values()), default=0)):
        for name, measures in methods.items():
            if seed < len(measures):
                found[name].append(bench.kept(f"{recipe} {name} {seed}", measures[seed]))
    return found


def tried(bench: Bench, recipe: str) -> dict[str, list[Measure]]:
    """Of each method, a measurement for each seed."""
    given = bench.given
    found: dict[str, list[Measure]] = {"search, no data": [partial(bench.measure, recipe, Fit("search"))]}
    for method in METHODS:
        found[method] = [partial(bench.fitted, recipe, method, seed) for seed in range(given.seeds)]
    found["solve, drift"] = [partial(bench.made, recipe, seed, None) for seed in range(given.drift_seeds)]
    if recipe in given.learn:
        lesson = Lesson(steps=given.steps)
        found["round"] = [partial(bench.made, recipe, seed, lesson) for seed in range(given.drift_seeds)]
    if recipe in given.train:
        found["solve, drift, scales trained"] = [
            partial(bench.trained, recipe, seed) for seed in range(given.drift_seeds)
        ]
    if given.method is not None:
        found = {name: measures for name, measures in found.items() if name in given.method}
    if given.environments:
        for name in given.peer:
            if takes(name, recipe):
                found[name] = [partial(bench.peer, name, recipe, seed) for seed in range(given.peer_seeds)]
    return {name: measures for name, measures in found.items() if measures}


def read_texts(file: Path | None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The text to train on, and the unseen one, of a file; without one, this Python's own."""
    if file is None:
        return texts()
    with np.load(file) as found:
        return found["text"].astype(np.int32), found["unseen"].astype(np.int32)


if __name__ == "__main__":
    sys.exit(main())
