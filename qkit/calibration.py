"""`calibrate`: runs a float model on a text, block by block, and writes statistics of its layers' inputs."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.load import load
from qkit.engines.abilities import offers, require
from qkit.engines.blocks import Blocks, Hidden, Mixture, Watches
from qkit.engines.layer import Layer
from qkit.engines.protocol import Builds
from qkit.engines.translation import Translates
from qkit.errors import ArtifactError, PlanError
from qkit.expert_moments import mixtures_of, moments_of, noted, noted_experts, with_enough
from qkit.experts import expert_of
from qkit.fitting.identity import identity
from qkit.fitting.run import Run
from qkit.grid import Grid
from qkit.planning import plan
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
    """Writes statistics of the inputs of linear layers and experts of the float model in `folder` to the new directory `out`.

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
    model, layers = open_float(engine, folder)
    grids = {path: rule.activation for path, rule in rules_of(engine, model, recipe).items() if rule.activation}
    blocks = engine.blocks(model, length=rows.shape[1])
    settings = {"activations": {path: str(grid) for path, grid in grids.items()}}
    run = Run(out, about(folder, rows, engine), settings, batch=batch, names=file_names(engine, model, folder))
    if not run.done:
        run.enter(blocks, rows, "states")
    for number, where in enumerate(blocks.paths):
        if number >= run.done:
            mine = {path: layer for path, layer in layers.items() if path.startswith(f"{where}.")}
            watched = {path: grids.get(path) for path, layer in mine.items() if layer.kind == "linear"}
            _watch(run, blocks, number, watched, mixtures_of(mine, grids, folder))
        blocks.leave(number)
        tick(where, len(rows))
    return run.finish(len(blocks.paths))


def _watch(
    run: Run, blocks: Blocks, number: int, watched: Mapping[str, Grid | None], experts: Mapping[str, Mixture]
) -> None:
    """Runs one block on all states, and writes its outputs, then its moments."""
    put = putting(run, "states", number + 1)
    seen = blocks.run(number, run.states("states", number), watched, put=put, experts=experts)
    layers = {path: noted(seen[path], grid) for path, grid in watched.items() if path in seen}
    tensors = moments_of({path: seen[path] for path in layers})
    for mixture in experts.values():
        enough = with_enough(seen, mixture)
        tensors |= moments_of(enough)
        layers |= noted_experts(seen, enough, mixture)
    run.write(number, tensors, layers)


def putting(run: Run, name: str, number: int) -> Callable[[Hidden], None]:
    """A function that writes states before block `number`, one batch after another."""
    place = 0

    def put(part: Hidden) -> None:
        nonlocal place
        run.put(name, number, place, part)
        place += len(part)

    return put


def open_float(engine: Builds, folder: Path) -> tuple[Any, dict[str, Layer]]:
    """The float model in `folder`, and its linear layers and experts by path."""
    model = load(folder, backend=engine)
    layers = {layer.path: layer for layer in engine.layers(model) if layer.kind in ("linear", "experts")}
    if any(layer.stage != "float" for layer in layers.values()):
        raise ArtifactError(f"{folder} is quantized: statistics are those of the float model")
    return model, layers


def file_names(engine: Builds, model: Any, folder: Path) -> dict[str, str]:
    """The paths of layers in the files of `folder`, by their paths in the model, where these are other ones."""
    if not offers(engine, Translates):
        return {}
    slots = {name.removesuffix(".weight"): one.slot.shape for name, one in read_folder(folder)[0].items()}
    linear = {path: shape for path, shape in slots.items() if len(shape) == 2 and not expert_of(path)}
    try:
        _, paths = engine.translate(model, {}, linear)
    except ArtifactError:  # the model splits or joins one of them, which is no layer then
        paths = {}
        for path, shape in linear.items():
            with suppress(ArtifactError):
                paths |= engine.translate(model, {}, {path: shape})[1]
    return {mine: own for own, mine in paths.items() if own != mine}


def rules_of(engine: Builds, model: Any, recipe: Recipe | None) -> dict[str, Rule]:
    """The rules of a recipe for linear layers and experts, by path."""
    if recipe is None:
        return {}
    rules = {item.layer.path: item.rule for item in plan(list(engine.layers(model)), recipe) if item.rule}
    for path, rule in rules.items():
        if rule.activation and rule.range != "dynamic":
            raise PlanError(
                f"{path}: the recipe's range is {rule.range!r}, which a prepared model finds: calibrate without it"
            )
    return {path: rule for path, rule in rules.items() if rule.kind in ("linear", "experts")}


def about(folder: Path, rows: NDArray[np.int32], engine: Builds) -> dict[str, Any]:
    """The model, the text and the recipe of the statistics."""
    return {
        "model": identity(read_folder(folder)[0]),
        "data": hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        "tokens": int(rows.size),
        "length": int(rows.shape[1]),
        "windows": len(rows),
        "engine": engine.name,
    }
