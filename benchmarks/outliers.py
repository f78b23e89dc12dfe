"""Whether scaled or rotated inputs win over fitted codes: AWQ, Hadamard and llm-compressor's GPTQ, by the same moments.

The first rows have the outliers of the inputs of each kind of layer of a float model: the greatest of the channels' root mean
squares over their median, the greatest magnitude over the root mean square, and the kurtosis. Then each recipe has a row: the
share of rounding's KL divergence that is won back on unseen text by the weights Q(W T) T^-1, whose inputs are T^-1 x. T is
nothing; or it scales each input by a power of its root mean square, the one of 20 with which rounding loses least (AWQ,
https://arxiv.org/abs/2306.00978); or it rotates the inputs of every layer by signs and Hadamard matrices (QuaRot,
https://arxiv.org/abs/2404.00456). Inputs get T^-1 exactly here; a program has to multiply by it in each step.

Usage: python -P benchmarks/outliers.py MODEL [--recipe NAME ...] [--windows N] [--length N] [--unseen N] [--seed N]
       [--text FILE.npz] [--device NAME] [--peer FOLDER] [--out FILE.json]

`--text` is as for fit.py, and `--peer` as for fit_time.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parent))  # -P leaves it out, since kernels.py here would hide a package of that name

import numpy as np
import torch
from fit import Bench
from fit_time import by_peer, peer
from measure import Report
from torch import Tensor

import qkit
from qkit.fitting.inputs import Inputs
from qkit.fitting.statistics import open_statistics
from qkit.grid import Grid

RECIPES = ("int4-g32", "int3-g32", "int2-g32", "mxfp4-a16", "nvfp4-a16")
POWERS = 20  #: that AWQ tries, from 0 to 1


@dataclass
class Group:
    """Layers with the same inputs.

    Attributes:
        weights: [outputs, inputs] by path.
        moments: E[x x'] [inputs, inputs].
    """

    weights: dict[str, Tensor]
    moments: Tensor


@dataclass
class Basis:
    """Functions of the last axis.

    Attributes:
        there: of weights, times T.
        back: of values, times its inverse.
        inputs: times the transpose of the inverse.
    """

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    inputs: Callable[[Tensor], Tensor]


Values = Callable[[Group, Grid], Iterator[Tensor]]  #: the weights of a group, quantized and decoded


def same(x: Tensor) -> Tensor:
    """T that is nothing."""
    return x


def rotation(n: int, device: torch.device) -> Basis:
    """Signs and Hadamard matrices of the largest power of two that divides `n`."""
    size, matrix = n & -n, torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)).to(device) * 2.0 - 1.0

    def there(x: Tensor) -> Tensor:
        return ((x * signs).unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    def back(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, size)) @ matrix.T).flatten(-2) * signs

    return Basis(there, back, there)


def scaling(group: Group, quantized: Values, grid: Grid) -> Basis:
    """AWQ's: the power of the root mean squares of inputs with which rounding loses least."""
    sizes = group.moments.diagonal().clamp_min(1e-12).sqrt()
    tried = []
    for number in range(POWERS):
        s = sizes ** (number / POWERS)
        s = s / (s.max() * s.min()).sqrt()
        basis = Basis(lambda x, s=s: x * s, *[lambda x, s=s: x / s] * 2)
        found = moved(group, grid, basis, quantized)
        errors = [w - v for w, v in zip(group.weights.values(), found, strict=True)]
        tried.append((sum(float(((d @ group.moments) * d).sum()) for d in errors), number, basis))
    return min(tried, key=lambda one: one[:2])[2]


def moved(group: Group, grid: Grid, basis: Basis, quantized: Values) -> list[Tensor]:
    """Q(W T) T^-1 of each weight of a group."""
    moments = basis.inputs(basis.inputs(group.moments).T).contiguous()
    inside = Group({path: basis.there(w) for path, w in group.weights.items()}, moments)
    return [basis.back(values) for values in quantized(inside, grid)]


def by_rule(engine: Any, group: Group, grid: Grid) -> Iterator[Tensor]:
    """Rounded to nearest; `nvfp4` shares its scale of the tensor."""
    peak = max(float(w.abs().max()) for w in group.weights.values()) if grid.scale == "nvfp4" else None
    for w in group.weights.values():
        q = engine.quantize(w, grid) if peak is None else engine.quantize(w, grid, peak=peak)
        yield engine.dequantize(q)


def by_solve(engine: Any, group: Group, grid: Grid) -> Iterator[Tensor]:
    """Solved."""
    peak = max(float(w.abs().max()) for w in group.weights.values()) if grid.scale == "nvfp4" else None
    known = Inputs(group.moments.cpu().numpy(), engine)
    for w in group.weights.values():
        q = known.solve(w.cpu().numpy(), grid, peak=peak)
        yield torch.from_numpy(qkit.reference.dequantize(q)).to(w.device)


def by_gptq(quantize_weight: Callable[..., Any], group: Group, grid: Grid) -> Iterator[Tensor]:
    """By llm-compressor."""
    yield from by_peer(quantize_weight, list(group.weights.values()), group.moments, bits=grid.element.bits)


def groups_of(engine: Any, model: Any, folder: Path) -> list[Group]:
    """The layers of the blocks of a model, with statistics in `folder`."""
    known, found = open_statistics(folder), dict[str, Group]()
    for layer in engine.layers(model):
        if layer.kind == "linear" and known.has(layer.path):
            like, w = known.like(layer.path), engine.weight(layer.module).detach().float()
            if like not in found:
                found[like] = Group({}, torch.from_numpy(np.array(known.moments(like))).to(w.device))
            found[like].weights[layer.path] = w.clone()
    return list(found.values())


def outliers(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """A row for each kind of layer: the medians over blocks, and the greatest."""
    seen: dict[str, list[tuple[float, float, float]]] = {}

    def watch(kind: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().flatten(0, -2)
            channels, square = x.square().mean(0).sqrt(), x.square().mean()
            spread = float(channels.max() / channels.median())
            peak, kurtosis = float(x.abs().max() / square.sqrt()), float(x.pow(4).mean() / square**2)
            seen.setdefault(kind, []).append((spread, peak, kurtosis))

        return hook

    kinds = ("q_proj", "o_proj", "gate_proj", "down_proj")
    modules = [(p.rpartition(".")[2], m) for p, m in bench.teacher.named_modules() if p.endswith(kinds)]
    hooks = [module.register_forward_pre_hook(watch(kind)) for kind, module in modules]
    bench.engine.logits(bench.teacher, bench.windows(seed)[:8])
    for hook in hooks:
        hook.remove()
    names = ("channels, max / median", "max / rms", "kurtosis")
    rows = []
    for kind, values in seen.items():
        ends = {
            n: [round(f(v), 1) for f in (np.median, max)] for n, v in zip(names, zip(*values, strict=True), strict=True)
        }
        rows.append({"inputs of": kind, "median and greatest over blocks": ends})
    return rows


def trials(bench: Bench, quantize_weight: Callable[..., Any] | None, whole: bool) -> Iterator[tuple[str, str, Values]]:
    """The name of each method but rounding, its kind of T, and its values."""
    rule, solve = partial(by_rule, bench.engine), partial(by_solve, bench.engine)
    yield "solve", "", solve
    if quantize_weight and whole:
        yield "llm-compressor GPTQ", "", partial(by_gptq, quantize_weight)
    for basis in ("AWQ", "Hadamard"):
        yield f"{basis}, rounded", basis, rule
        yield f"{basis}, solved", basis, solve


def divergence(bench: Bench, model: Any, groups: list[Group], grid: Grid, kind: str, quantized: Values) -> float:
    """Mean KL divergence of the float model from `model`, all of whose layers get other weights first."""
    blocks = bench.engine.blocks(model, length=bench.given.length)
    for group in groups:
        n, device = len(group.moments), group.moments.device
        basis = Basis(same, same, same)
        if kind == "AWQ":
            basis = scaling(group, partial(by_rule, bench.engine), grid)
        elif kind == "Hadamard":
            basis = rotation(n, device)
        for path, values in zip(group.weights, moved(group, grid, basis, quantized), strict=True):
            blocks.put(path, values.float().cpu().numpy())
    return bench.divergence(model)


def main() -> int:
    """Prints the outliers, and a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name, value in {"windows": 64, "length": 256, "unseen": 40, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recipe", nargs="*", default=list(RECIPES))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--backend", default="torchao")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = Report(given.out, device=given.device, packages=("transformers", "qkit-quant"))
    quantize_weight = given.peer and peer(given.peer)
    with TemporaryDirectory() as place:
        bench = Bench(given, Path(place))
        report.about = {"parameters": sum(p.numel() for p in bench.teacher.parameters()), "windows": given.windows}
        for row in outliers(bench, given.seed):
            report.add(row)
        model = qkit.load(given.model, backend=bench.engine)
        groups = groups_of(bench.engine, model, bench.statistics(given.seed))
        for recipe in given.recipe:
            grid = next(rule.weight for rule in qkit.recipe(recipe).rules if rule.weight)
            rounded = divergence(bench, model, groups, grid, "", partial(by_rule, bench.engine))
            row = {"recipe": recipe, "rounded KL": round(rounded, 6)}
            for name, kind, quantized in trials(bench, quantize_weight, grid.element.kind == "integer"):
                found = divergence(bench, model, groups, grid, kind, quantized)
                row[name] = round(100 * (1 - found / rounded), 1)
            report.add(row)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
