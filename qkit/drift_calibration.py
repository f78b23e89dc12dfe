"""`calibrate_drift`: runs a float model and the fitted one on a text, and writes the weights to aim at; see `qkit.drift`."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.calibration import Tick, about, file_names, open_float, putting, rules_of
from qkit.drift import Aim, correct_block, correct_head
from qkit.engines.abilities import require
from qkit.engines.blocks import Blocks, Hidden, Learns, Lesson, Watches
from qkit.engines.layer import Layer
from qkit.engines.protocol import Builds
from qkit.errors import GridError, PlanError
from qkit.expert_moments import Mixed, mixtures_of
from qkit.fitting.rows import root_of
from qkit.fitting.run import Run
from qkit.fitting.statistics import AIM, HEAD, LEARNED
from qkit.grid import Grid
from qkit.metric import STATES, WIDEST, gather_metrics, metrics_of
from qkit.qtensor import QTensor
from qkit.reference.rounding import dequantize
from qkit.reference.steps import want_fitted
from qkit.rules import Recipe, Rule


def calibrate_drift(
    folder: Path,
    out: Path,
    rows: NDArray[np.int32],
    *,
    engine: Builds,
    recipe: Recipe,
    batch: int = 8,
    lesson: Lesson | None = None,
    tick: Tick = lambda name, done: None,
) -> Path:
    """As `calibrate`, for `solve` by one recipe: statistics of the inputs in the fitted model, and the weights to aim at.

    The float model and the fitted one run side by side; see `qkit.drift`. The solved codes of layers whose rule has
    `rounding = "learned"` are those that their block begins to learn from; `round` takes the codes that it ends with.

    Args:
        lesson: how rounding is learned, by all layers if no rule names any. None: only where a rule wants it.

    Raises:
        PlanError, RunError, RangeError, ArtifactError, BackendError: as `calibrate`. PlanError also for recipes that quantize
            inputs.
        GridError: scales of a weight's grid follow from no rule.
    """
    engine = require(engine, Watches).mapping()
    model, layers = open_float(engine, folder)
    twin, _ = open_float(engine, folder)
    rules = rules_of(engine, model, recipe)
    every = {path: rule.weight for path, rule in rules.items() if rule.weight}
    grids = {path: grid for path, grid in every.items() if layers[path].kind == "linear"}
    for path, rule in rules.items():
        if rule.activation:
            raise PlanError(
                f"{path}: drift is not corrected for recipes that quantize inputs: calibrate without --drift"
            )
    for grid in dict.fromkeys(every.values()):
        want_fitted(grid)
    heads = _heads(engine, model, every)
    lesson, pupils = _pupils(lesson, rules, grids)
    learner = require(engine, Learns) if pupils else None
    blocks, fitted = (engine.blocks(one, length=rows.shape[1]) for one in (model, twin))
    settings = {"aims": {path: str(grid) for path, grid in every.items()}, "learn": sorted(pupils)}
    told = about(folder, rows, engine) | {"rows": "coupled"} | ({"lesson": asdict(lesson)} if lesson else {})
    run = Run(out, told, settings, batch=batch, names=file_names(engine, model, folder))
    if not run.done:
        run.enter(blocks, rows, "states", "fitted")
    if run.done < len(blocks.paths):
        gather_metrics(run, blocks, rows, [_coupled(layers, grids, where) for where in blocks.paths], batch=batch)
    for number, where in enumerate(blocks.paths):
        if number >= run.done:
            mine = {path: grid for path, grid in grids.items() if path.startswith(f"{where}.")}
            weights = {path: engine.to_numpy(engine.weight(layers[path].module)) for path in mine}
            here = {path: layers[path] for path in every if path not in grids and path.startswith(f"{where}.")}
            mixed = Mixed(engine, mixtures_of(here, {}, folder), here, every)
            learn = _learning(learner, fitted, number, run, lesson, pupils) if learner and lesson else None
            last = number == len(blocks.paths) - 1
            _correct(engine, run, blocks, fitted, number, mine, weights, mixed, learn, heads if last else ())
        blocks.leave(number)
        fitted.leave(number)
        tick(where, len(rows))
    return run.finish(len(blocks.paths))


def _heads(engine: Builds, model: Any, quantized: Collection[str]) -> list[str]:
    """The output heads that stay in float, and share their weight with no other layer."""
    layers = list(engine.layers(model))
    tied = {layer.tied for layer in layers} | {layer.path for layer in layers if layer.tied}
    heads = [layer.path for layer in layers if layer.kind == "linear" and layer.head]
    return [path for path in heads if path not in quantized and path not in tied]


def _coupled(layers: Mapping[str, Layer], grids: Mapping[str, Grid], where: str) -> list[str]:
    """The layers to fit of a block whose rows make up for each other."""
    mine = [path for path, grid in grids.items() if path.startswith(f"{where}.") and grid.group != "tensor"]
    return [path for path in mine if layers[path].shape[0] <= WIDEST]


def _pupils(
    lesson: Lesson | None, rules: Mapping[str, Rule], grids: Mapping[str, Grid]
) -> tuple[Lesson | None, frozenset[str]]:
    """How rounding is learned, and by which layers.

    Raises:
        GridError: a layer has one scale for its whole weight.
    """
    named = frozenset(path for path in grids if rules[path].rounding == "learned")
    if lesson is None and not named:
        return None, named
    pupils = named or frozenset(grids)
    for path in pupils:
        if grids[path].group == "tensor":
            raise GridError(f"{path}: rounding is not learned on {grids[path]}, whose rows share a scale: take groups")
    return lesson or Lesson(), pupils


def _learning(
    engine: Learns, fitted: Blocks, number: int, run: Run, lesson: Lesson, pupils: frozenset[str]
) -> Callable[[Mapping[str, Aim]], dict[str, QTensor[NDArray[Any]]]]:
    """A function that learns the rounding of a block whose layers have been fitted, and puts the values there."""

    def learn(aims: Mapping[str, Aim]) -> dict[str, QTensor[NDArray[Any]]]:
        starts = {path: aim.q for path, aim in aims.items() if path in pupils}
        if not starts:
            return {}
        before, after = run.whole("fitted", number), run.whole("states", number + 1)
        metric = metrics_of(run, number).get(STATES)
        root = root_of(metric) if metric is not None and metric.any() else None
        found = engine.learn(fitted, number, before, after, starts, lesson, root)
        for path, q in found.items():
            fitted.put(path, dequantize(q))
        return found

    return learn


def _correct(
    engine: Watches,
    run: Run,
    blocks: Blocks,
    fitted: Blocks,
    number: int,
    grids: Mapping[str, Grid],
    weights: Mapping[str, NDArray[Any]],
    mixed: Mixed,
    learn: Callable[[Mapping[str, Aim]], dict[str, QTensor[NDArray[Any]]]] | None,
    heads: Iterable[str],
) -> None:
    """Fits one block of the fitted model, runs both models on, and writes the moments, aims and learned codes of its layers."""

    def states() -> Iterator[tuple[Hidden, Hidden]]:
        return zip(run.states("states", number), run.states("fitted", number), strict=True)

    metrics = metrics_of(run, number)
    aims = correct_block(number, blocks, fitted, states, grids, weights, metrics, engine) if grids else {}
    tensors, layers = mixed.fit(fitted, number, run.states("fitted", number)) if mixed.mixtures else ({}, {})
    blocks.run(number, run.states("states", number), {}, put=putting(run, "states", number + 1))
    learned = learn(aims) if learn else {}
    fitted.run(number, run.states("fitted", number), {}, put=putting(run, "fitted", number + 1))
    tensors |= {path: aim.moments for path, aim in aims.items() if aim.moments is not None}
    tensors |= {path + AIM: aim.weight for path, aim in aims.items() if path not in learned}
    tensors |= {path + LEARNED + name: part for path, q in learned.items() for name, part in q.parts().items()}
    layers |= {
        path: {"like": aim.like, "tokens": aim.tokens, "activation": None, "grid": str(grids[path]), "peak": aim.peak}
        | ({"rounding": "learned"} if path in learned else {})
        for path, aim in aims.items()
    }
    for path in heads:
        after = zip(run.states("states", number + 1), run.states("fitted", number + 1), strict=True)
        if found := correct_head(path, blocks, fitted, after):
            tensors[path + HEAD], tokens = found
            layers[path] = {"like": path, "tokens": tokens, "activation": None, "head": True}
    run.write(number, tensors, layers)
