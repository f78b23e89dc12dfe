"""`calibrate`: runs a float model on a text, block by block, and writes the statistics of the inputs of its layers.

The states between blocks lie in files, so that memory has the model, one block's moments, and a batch. After each block a file of
its moments is there; an interrupted run goes on behind the last one, and ends with the same bytes.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.load import load
from qkit.engines.abilities import require
from qkit.engines.blocks import Blocks, Hidden, Seen, Watches
from qkit.engines.protocol import Builds
from qkit.errors import ArtifactError, FewTokensWarning, PlanError, RangeError, RunError
from qkit.fitting.identity import identity
from qkit.fitting.statistics import file_digest, write_note
from qkit.grid import Grid
from qkit.planning import plan
from qkit.rules import Recipe
from qkit.storage.read import read_folder

FEW = 20  #: tokens for each input of a block; fewer are too few for the codes to be as good as they can be
RUN = "run.json"
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
    watching = require(engine, Watches)
    if out.exists():
        raise PlanError(f"{out} is there already: remove it, or choose another place")
    tensors, _ = read_folder(folder)
    model = load(folder, backend=engine)
    layers = [layer for layer in engine.layers(model) if layer.kind == "linear"]
    if any(layer.stage != "float" for layer in layers):
        raise ArtifactError(f"{folder} is quantized: statistics are those of the float model")
    grids = _activations(engine, model, recipe)
    blocks = watching.blocks(model, length=rows.shape[1])
    about = {
        "model": identity(tensors),
        "data": hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        "tokens": int(rows.size),
        "length": int(rows.shape[1]),
        "windows": len(rows),
        "engine": engine.name,
    }
    aside = out.with_name(f"{out.name}.part")
    done = _begin(aside, {**about, "batch": batch, "activations": {path: str(grid) for path, grid in grids.items()}})
    found: dict[str, dict[str, Any]] = {}
    for number, where in enumerate(blocks.paths):
        file = aside / f"block-{number:05}.safetensors"
        watched = {one.path: grids.get(one.path) for one in layers if one.path.startswith(f"{where}.")}
        if number >= done:
            if number == 0:
                _enter(blocks, rows, aside, batch)
            _run(blocks, number, aside, rows.shape, batch, watched, file)
        seen = json.loads((aside / f"{file.stem}.json").read_text(encoding="utf-8"))
        for path, one in seen.items():
            grid = watched[path]
            found[path] = {**one, "file": file.name, "activation": None if grid is None else str(grid)}
        tick(where, len(rows))
    files = {
        f"block-{n:05}.safetensors": ""
        for n in range(len(blocks.paths))
        if (aside / f"block-{n:05}.safetensors").stat().st_size
    }
    write_note(aside, {**about, "files": {name: file_digest(aside / name) for name in files}, "layers": found})
    for rest in (RUN, "states-0.npy", "states-1.npy", *(f"{Path(name).stem}.json" for name in files)):
        (aside / rest).unlink(missing_ok=True)
    aside.rename(out)
    return out


def _activations(engine: Builds, model: Any, recipe: Recipe | None) -> dict[str, Grid]:
    """The grids that a recipe rounds the inputs of linear layers to, by path."""
    if recipe is None:
        return {}
    rules = {item.layer.path: item.rule for item in plan(list(engine.layers(model)), recipe) if item.rule}
    for path, rule in rules.items():
        if rule.activation and rule.range != "dynamic":
            raise PlanError(
                f"{path}: the recipe's range is {rule.range!r}, which a prepared model finds: calibrate without it"
            )
    return {path: rule.activation for path, rule in rules.items() if rule.activation and rule.kind == "linear"}


def _begin(aside: Path, run: Mapping[str, Any]) -> int:
    """Makes the directory of a run, or finds that of the same run; returns how many blocks are done."""
    text = json.dumps(run, sort_keys=True)
    if aside.exists() and (not (aside / RUN).is_file() or (aside / RUN).read_text(encoding="utf-8") != text):
        shutil.rmtree(aside)  # of another model, text or engine
    aside.mkdir(parents=True, exist_ok=True)
    (aside / RUN).write_text(text, encoding="utf-8")
    done = 0
    while (aside / f"block-{done:05}.safetensors").exists():
        done += 1
    return done


def _enter(blocks: Blocks, rows: NDArray[np.int32], aside: Path, batch: int) -> None:
    """Writes the states before the first block, after a check that there are enough tokens for their width."""
    states: NDArray[np.float32] | None = None
    for start in range(0, len(rows), batch):
        part = blocks.enter(rows[start : start + batch])
        if states is None:
            _want_tokens(rows.size, part.shape[-1])
            states = _states(aside, 0, (*rows.shape, part.shape[-1]), "w+")
        states[start : start + batch] = part
    assert isinstance(states, np.memmap)
    states.flush()


def _want_tokens(tokens: int, width: int) -> None:
    if tokens < width:
        raise RunError(
            f"{tokens:,} tokens are too few for blocks of {width:,} inputs: give more text, or more windows, of at least "
            f"{FEW * width:,} tokens"
        )
    if tokens < FEW * width:
        warnings.warn(
            f"{tokens:,} tokens are few for blocks of {width:,} inputs: from {FEW * width:,} on, more change little",
            FewTokensWarning,
            stacklevel=2,
        )


def _run(
    blocks: Blocks,
    number: int,
    aside: Path,
    shape: tuple[int, ...],
    batch: int,
    watched: Mapping[str, Grid | None],
    file: Path,
) -> None:
    """Runs one block on all states, and writes its outputs, then its moments."""
    before = np.load(aside / f"states-{number % 2}.npy", mmap_mode="r")
    after = _states(aside, (number + 1) % 2, before.shape, "w+")
    place = 0

    def put(out: Hidden) -> None:
        nonlocal place
        after[place : place + len(out)] = out
        place += len(out)

    seen = blocks.run(number, _parts(before, batch), watched, put=put)
    after.flush()
    _write(file, blocks.paths[number], seen)


def _parts(states: NDArray[np.float32], batch: int) -> Iterator[Hidden]:
    return (states[start : start + batch] for start in range(0, len(states), batch))


def _write(file: Path, where: str, seen: Mapping[str, Seen]) -> None:
    from safetensors.numpy import save_file

    moments = {path: np.ascontiguousarray(one.moments) for path, one in seen.items() if one.moments is not None}
    for path, array in moments.items():
        if not np.isfinite(array).all():
            raise RangeError(f"{path}: its inputs hold NaN or infinity, or numbers whose squares do: find their origin")
    layers = {path: {"like": one.like, "tokens": one.tokens} for path, one in seen.items()}
    file.with_suffix(".json").write_text(json.dumps(layers, sort_keys=True), encoding="utf-8")
    aside = file.with_suffix(".new")
    save_file(moments or {where: np.zeros(0, np.float32)}, aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    aside.rename(file)  # the last thing: where this file is, everything before it is


def _states(aside: Path, number: int, shape: tuple[int, ...], mode: Any) -> "np.memmap[Any, np.dtype[np.float32]]":
    found: np.memmap[Any, np.dtype[np.float32]] = np.lib.format.open_memmap(
        aside / f"states-{number}.npy", mode=mode, dtype=np.float32, shape=shape
    )
    return found
