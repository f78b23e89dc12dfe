"""The share of the quantization loss that training wins back, and the share that deploying on another grid loses again.

For each seed a small Llama (small_llama.py) is trained on Python's own source files, byte by byte; every tenth file is held out.
From there, as many steps more: in float, and on the grid of each recipe. Shares are counted against the float model that was
trained as long, with a paired bootstrap over windows of held-out text. Then int4-g64 trained for each dialect (`signed`,
`absmax`, `midmax`, MLX's affine), deployed on each.

Usage: python benchmarks/recover.py [--device cuda] [--size 4m|30m|tiny] [--seeds N] [--float-steps N] [--steps N] [--batch N]
       [--length N] [--windows N] [--float-rate R] [--rate R] [--half] [--recipe NAME ...] [--no-matrix] [--jobs N]
       [--out FILE.json]
"""

import argparse
import multiprocessing
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from affine import convert_affine, prepare_affine
from measure import Report
from numpy.typing import NDArray
from small_llama import SIZES, Llama, Run, train
from torch import nn

import qkit
from qkit.evaluation import Evaluation, consecutive, evaluate
from qkit.report import Estimate, evaluate_matrix, mean, recovered

RECIPES = ("int8-dynamic-act-int4-weight", "int3-g64", "int3-g32", "int2-g64", "int2-g32", "mxfp4")
DIALECTS = {"signed": "int4-g64", "absmax": "int4-g64-absmax", "midmax": "int4-g64-midmax"}
APART = ("site-packages", "test", "tests", "idlelib")  # as in qkit/demo.py
Surgery = Callable[[nn.Module], nn.Module]
Losses = NDArray[np.float64]


def texts() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The bytes of Python's own source files: to train on, and every tenth file, held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if not set(APART) & set(file.relative_to(folder).parts))
    parts = [[file for number, file in enumerate(files) if bool(number % 10) == seen] for seen in (True, False)]
    text, unseen = (np.frombuffer(b"".join(file.read_bytes() for file in some), np.uint8) for some in parts)
    return text.astype(np.int32), unseen.astype(np.int32)


class Seed:
    """Everything that is made from one seed: the float model, the same trained on, and what comes of both."""

    def __init__(self, seed: int, given: argparse.Namespace, text: torch.Tensor, rows: NDArray[np.int32]) -> None:
        self.seed, self.given, self.text, self.rows = seed, given, text, rows
        self.engine = qkit.backend("torchao").on(given.device)
        self.curves: dict[str, list[float]] = {}
        model = self._llama()
        self._train("float", model, steps=given.float_steps, rate=given.float_rate, weight_decay=0.1, seed=seed)
        self.start = self._weights(model)
        self.teacher = model
        self.longer = self._more("float, longer", lambda model: model)
        self.found = {name: self.measure(self.model(state)) for name, state in self.floats().items()}

    def floats(self) -> dict[str, dict[str, torch.Tensor]]:
        """The float models' weights."""
        return {"float": self.start, "float, longer": self.longer}

    def model(self, state: dict[str, torch.Tensor]) -> nn.Module:
        """A float model with these weights."""
        model = self._llama()
        model.load_state_dict(state)
        return model

    def trained(self, name: str, prepare: Surgery) -> dict[str, torch.Tensor]:
        """The master weights after the extra steps on the grid."""
        return self._more(name, prepare)

    def measure(self, model: nn.Module) -> Evaluation:
        """On the held-out text, beside the float model."""
        return evaluate(self.engine, model, self.rows, teacher=self.teacher)

    def _more(self, name: str, prepare: Surgery) -> dict[str, torch.Tensor]:
        model = prepare(self.model(self.start))
        self._train(
            name, model, steps=self.given.steps, rate=self.given.rate, weight_decay=0.0, seed=self.seed + 1_000_000
        )
        return self._weights(model)

    def _train(self, name: str, model: nn.Module, **run: Any) -> None:
        batch, length, half = self.given.batch, self.given.length, self.given.half
        began = time.perf_counter()
        self.curves[name] = train(model, self.text, Run(batch=batch, length=length, half=half, **run))
        took = time.perf_counter() - began
        print(f"seed {self.seed}, {name}: {self.curves[name][-1]:.4f} after {took:.1f} s", file=sys.stderr)

    def _llama(self) -> nn.Module:
        model = Llama(SIZES[self.given.size], seed=self.seed, longest=self.given.length)
        return model.to(self.given.device).eval()

    def _weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def recovery(run: Seed, name: str) -> dict[str, Evaluation]:
    """Float trained as long, quantized before and after that, and trained on the grid."""
    recipe = qkit.recipe(name)
    masters = run.trained(name, lambda model: qkit.prepare(model, recipe))
    states = {"ptq": run.start, "longer_ptq": run.longer, "qat": masters}
    return {row: run.measure(qkit.convert(run.model(state), recipe)) for row, state in states.items()}


def dialects(run: Seed) -> dict[str, dict[str, Evaluation]]:
    """Trained for each dialect of int4-g64, and not at all, deployed on each."""
    prepare: dict[str, Surgery] = {
        name: lambda model, recipe=recipe: qkit.prepare(model, recipe) for name, recipe in DIALECTS.items()
    }
    deploy: dict[str, Surgery] = {
        name: lambda model, recipe=recipe: qkit.convert(model, recipe) for name, recipe in DIALECTS.items()
    }
    prepare["mlx affine"], deploy["mlx affine"] = prepare_affine, convert_affine
    states = {"float, longer": run.longer}
    states |= {name: run.trained(f"int4-g64 {name}", surgery) for name, surgery in prepare.items()}
    makers = {name: (lambda state=state: run.model(state)) for name, state in states.items()}
    return evaluate_matrix(run.engine, makers, deploy, run.rows, teacher=run.teacher)


def estimate(one: Estimate | None) -> dict[str, float] | None:
    """Rounded, for JSON."""
    return None if one is None else {name: round(number, 6) for name, number in asdict(one).items()}


def numbers(one: Evaluation) -> dict[str, Any]:
    """Rounded, for JSON."""
    assert one.kl is not None
    return {"loss": round(one.loss, 6), "kl": round(float(one.kl.mean()), 6)}


def recovery_table(floats: Losses, rows: dict[str, Losses]) -> dict[str, Any]:
    """The loss that training won back, from losses [windows]: the share with its interval, and both sides of it."""
    ptq, qat = rows["longer_ptq"], rows["qat"]
    return {
        "cost": estimate(mean(ptq - floats)),
        "won": estimate(mean(ptq - qat)),
        "recovered": estimate(recovered(floats, ptq, qat)),
    }


def matrix_table(found: dict[str, dict[str, Losses]], untrained: str) -> dict[str, Any]:
    """From losses [windows] by train grid and deploy grid: each cell's loss, and what training and the move made of it."""
    table: dict[str, Any] = {}
    for trained, row in found.items():
        table[trained] = {}
        for deployed, losses in row.items():
            cell: dict[str, Any] = {"loss": estimate(mean(losses))}
            if trained != untrained:
                cell["training premium"] = estimate(mean(found[untrained][deployed] - losses))
                cell["deployment premium"] = estimate(mean(losses - row[trained])) if deployed != trained else None
            table[trained][deployed] = cell
    return table


def pooled(seeds: list[Losses]) -> Losses:
    """The mean over seeds, window by window."""
    return np.mean(seeds, axis=0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="4m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--float-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--half", action="store_true", help="train in bfloat16, under autocast")
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--no-matrix", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@dataclass
class Found:
    """The results of one seed: losses by window, and the row that is written."""

    longer: Losses
    rungs: dict[str, dict[str, Losses]]
    square: dict[str, dict[str, Losses]]
    written: dict[str, Any]


def of_seed(seed: int, given: argparse.Namespace) -> Found:
    """Trains and measures everything."""
    text, unseen = texts()
    rows = consecutive(unseen, length=given.length, windows=given.windows)
    run = Seed(seed, given, torch.from_numpy(text.astype(np.uint8)).to(given.device), rows)
    recipes = {name: recovery(run, name) for name in given.recipe or RECIPES}
    made = {} if given.no_matrix else dialects(run)
    longer = run.found["float, longer"].losses
    rungs = {name: {row: one.losses for row, one in found.items()} for name, found in recipes.items()}
    square = {t: {d: one.losses for d, one in row.items()} for t, row in made.items()}
    written = {
        "seed": seed,
        "floats": {name: numbers(one) for name, one in run.found.items()},
        "recipes": {
            name: {row: numbers(one) for row, one in found.items()} | recovery_table(longer, rungs[name])
            for name, found in recipes.items()
        },
        "matrix": matrix_table(square, "float, longer"),
        "curves": {name: [round(loss, 4) for loss in curve] for name, curve in run.curves.items()},
    }
    return Found(longer, rungs, square, written)


def all_seeds(given: argparse.Namespace) -> Iterator[Found]:
    """`of_seed` of each, side by side in as many processes as `given` has jobs."""
    if given.jobs == 1:
        yield from (of_seed(seed, given) for seed in range(given.seeds))
        return
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(of_seed, range(given.seeds), [given] * given.seeds)


def rows_of(seeds: list[Found]) -> list[dict[str, Any]]:
    """A row of all seeds so far, and one of each."""
    every = {
        name: {row: pooled([one.rungs[name][row] for one in seeds]) for row in found}
        for name, found in seeds[0].rungs.items()
    }
    square = {t: {d: pooled([one.square[t][d] for one in seeds]) for d in row} for t, row in seeds[0].square.items()}
    longer = pooled([one.longer for one in seeds])
    recipes = {name: recovery_table(longer, found) for name, found in every.items()}
    whole = {"seed": "all", "recipes": recipes, "matrix": matrix_table(square, "float, longer")}
    return [whole, *(one.written for one in seeds)]


def about(given: argparse.Namespace) -> dict[str, Any]:
    """The model, the settings and the text of a run."""
    text, unseen = texts()
    windows = len(consecutive(unseen, length=given.length, windows=given.windows))
    return {
        "parameters": sum(p.numel() for p in Llama(SIZES[given.size], seed=0, longest=1).parameters()),
        "settings": {name: value for name, value in vars(given).items() if name not in ("out", "recipe", "jobs")},
        "text": {"training bytes": len(text), "held-out bytes": len(unseen), "windows": windows},
    }


def main() -> None:
    given, began, seeds = arguments(), time.perf_counter(), []
    report = Report(given.out, device=given.device, packages=("qkit-quant",), about=about(given))
    for found in all_seeds(given):
        seeds.append(found)
        report.rows = rows_of(seeds)
        report.about["seconds"] = round(time.perf_counter() - began, 1)
        for name, one in report.rows[0]["recipes"].items():
            print(f"{report.about['seconds']} s, {len(seeds)} seeds", name, one, file=sys.stderr, flush=True)
        report.write()  # as far as it has come
    report.finish()


if __name__ == "__main__":
    main()
