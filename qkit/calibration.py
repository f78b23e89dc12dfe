"""`calibrate` and `calibrate_drift`: run a float model on a text, block by block, and write statistics of its layers' inputs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.load import load
from qkit.drift import Aim, correct_block
from qkit.engines.abilities import require
from qkit.engines.blocks import Blocks, Hidden, Learns, Lesson, Watches
from qkit.engines.layer import Layer
from qkit.engines.protocol import Builds
from qkit.errors import ArtifactError, GridError, PlanError
from qkit.fitting.identity import identity
from qkit.fitting.run import Run
from qkit.fitting.statistics import AIM, LEARNED
from qkit.grid import Grid
from qkit.planning import plan
from qkit.qtensor import QTensor
from qkit.reference.rounding import dequantize
from qkit.reference.steps import want_fitted
from qkit.rules import Recipe, Rule
from qkit.storage.read import read_folder

Tick = Callable[[str, int], None]


def calibrate(
    folder: Path,
    out: Path,
    rows: NDArray[np.int32],
    *,
    engine: Builds,
    batch: int = 8,
    recipe: Recipe | None = None,
    tick: Tick = lambda name, done: None,
) -> Path:
    """Writes statistics of the inputs of linear layers of the float model in `folder` to the new directory `out`.

    An interrupted run goes on behind the last block that it had done, and ends with the same bytes.

    Args:
        rows: tokens [windows, length].
        engine: the engine that runs the model. Sums of other engines, devices and numbers of threads differ in their last bits.
        batch: windows that run at once.
        recipe: the layers whose inputs it quantizes have the moments of these quantized inputs. None: of the inputs as they are.
        tick: called with the path of each block that is done, and the count of its windows.

    Returns:
        The folder.

    Raises:
        PlanError: `out` is there already, or the recipe has ranges that come from training.
        RunError: less tokens than a block has inputs.
        RangeError: inputs of a layer are not finite.
        ArtifactError, BackendError: the model does not open, or the engine cannot run its blocks by themselves.
    """
    engine = require(engine, Watches).mapping()
    model, layers = _open(engine, folder)
    grids = {path: rule.activation for path, rule in _rules(engine, model, recipe).items() if rule.activation}
    blocks = engine.blocks(model, length=rows.shape[1])
    settings = {"activations": {path: str(grid) for path, grid in grids.items()}}
    run = Run(out, _about(folder, rows, engine), settings, batch=batch)
    if not run.done:
        run.enter(blocks, rows, "states")
    for number, where in enumerate(blocks.paths):
        if number >= run.done:
            _watch(run, blocks, number, {path: grids.get(path) for path in layers if path.startswith(f"{where}.")})
        blocks.leave(number)
        tick(where, len(rows))
    return run.finish(len(blocks.paths))


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
    model, layers = _open(engine, folder)
    twin, _ = _open(engine, folder)
    rules = _rules(engine, model, recipe)
    grids = {path: rule.weight for path, rule in rules.items() if rule.weight and path in layers}
    for path, rule in rules.items():
        if rule.activation:
            raise PlanError(
                f"{path}: drift is not corrected for recipes that quantize inputs: calibrate without --drift"
            )
    for grid in dict.fromkeys(grids.values()):
        want_fitted(grid)
    lesson, pupils = _pupils(lesson, rules, grids)
    learner = require(engine, Learns) if pupils else None
    blocks, fitted = (engine.blocks(one, length=rows.shape[1]) for one in (model, twin))
    settings = {"aims": {path: str(grid) for path, grid in grids.items()}, "learn": sorted(pupils)}
    about = _about(folder, rows, engine) | ({"lesson": asdict(lesson)} if lesson else {})
    run = Run(out, about, settings, batch=batch)
    if not run.done:
        run.enter(blocks, rows, "states", "fitted")
    for number, where in enumerate(blocks.paths):
        if number >= run.done:
            mine = {path: grid for path, grid in grids.items() if path.startswith(f"{where}.")}
            weights = {path: engine.to_numpy(engine.weight(layers[path].module)) for path in mine}
            learn = _learning(learner, fitted, number, run, lesson, pupils) if learner and lesson else None
            _correct(engine, run, blocks, fitted, number, mine, weights, learn)
        blocks.leave(number)
        fitted.leave(number)
        tick(where, len(rows))
    return run.finish(len(blocks.paths))


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
        found = engine.learn(fitted, number, before, after, starts, lesson)
        for path, q in found.items():
            fitted.put(path, dequantize(q))
        return found

    return learn


def _watch(run: Run, blocks: Blocks, number: int, watched: Mapping[str, Grid | None]) -> None:
    """Runs one block on all states, and writes its outputs, then its moments."""
    seen = blocks.run(number, run.states("states", number), watched, put=_putting(run, "states", number + 1))
    layers = {
        path: {"like": one.like, "tokens": one.tokens, "activation": _text(watched[path])} for path, one in seen.items()
    }
    run.write(number, {path: one.moments for path, one in seen.items() if one.moments is not None}, layers)


def _correct(
    engine: Watches,
    run: Run,
    blocks: Blocks,
    fitted: Blocks,
    number: int,
    grids: Mapping[str, Grid],
    weights: Mapping[str, NDArray[Any]],
    learn: Callable[[Mapping[str, Aim]], dict[str, QTensor[NDArray[Any]]]] | None,
) -> None:
    """Fits one block of the fitted model, runs both models on, and writes the moments, aims and learned codes of its layers."""

    def states() -> Iterator[tuple[Hidden, Hidden]]:
        return zip(run.states("states", number), run.states("fitted", number), strict=True)

    aims = correct_block(number, blocks, fitted, states, grids, weights, engine) if grids else {}
    blocks.run(number, run.states("states", number), {}, put=_putting(run, "states", number + 1))
    learned = learn(aims) if learn else {}
    fitted.run(number, run.states("fitted", number), {}, put=_putting(run, "fitted", number + 1))
    tensors: dict[str, NDArray[Any]] = {path: aim.moments for path, aim in aims.items() if aim.moments is not None}
    tensors |= {path + AIM: aim.weight for path, aim in aims.items() if path not in learned}
    tensors |= {path + LEARNED + name: part for path, q in learned.items() for name, part in q.parts().items()}
    layers = {
        path: {"like": aim.like, "tokens": aim.tokens, "activation": None, "grid": str(grids[path]), "peak": aim.peak}
        | ({"rounding": "learned"} if path in learned else {})
        for path, aim in aims.items()
    }
    run.write(number, tensors, layers)


def _putting(run: Run, name: str, number: int) -> Callable[[Hidden], None]:
    """A function that writes states before block `number`, one batch after another."""
    place = 0

    def put(part: Hidden) -> None:
        nonlocal place
        run.put(name, number, place, part)
        place += len(part)

    return put


def _open(engine: Builds, folder: Path) -> tuple[Any, dict[str, Layer]]:
    """The float model in `folder`, and its linear layers by path."""
    model = load(folder, backend=engine)
    layers = {layer.path: layer for layer in engine.layers(model) if layer.kind == "linear"}
    if any(layer.stage != "float" for layer in layers.values()):
        raise ArtifactError(f"{folder} is quantized: statistics are those of the float model")
    return model, layers


def _rules(engine: Builds, model: Any, recipe: Recipe | None) -> dict[str, Rule]:
    """The rules of a recipe for linear layers, by path."""
    if recipe is None:
        return {}
    rules = {item.layer.path: item.rule for item in plan(list(engine.layers(model)), recipe) if item.rule}
    for path, rule in rules.items():
        if rule.activation and rule.range != "dynamic":
            raise PlanError(
                f"{path}: the recipe's range is {rule.range!r}, which a prepared model finds: calibrate without it"
            )
    return {path: rule for path, rule in rules.items() if rule.kind == "linear"}


def _about(folder: Path, rows: NDArray[np.int32], engine: Builds) -> dict[str, Any]:
    """The model, the text and the recipe of the statistics."""
    return {
        "model": identity(read_folder(folder)[0]),
        "data": hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        "tokens": int(rows.size),
        "length": int(rows.shape[1]),
        "windows": len(rows),
        "engine": engine.name,
    }


def _text(grid: Grid | None) -> str | None:
    return None if grid is None else str(grid)
