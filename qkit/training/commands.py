"""Another tool's training command on a model of qkit's: prepares the model, calls the command, and ships the result."""

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit import adapters, pipeline
from qkit.artifact.save import save
from qkit.code_changes import code_sums, count_changes
from qkit.engines.abilities import require
from qkit.engines.protocol import Adapts, Modules
from qkit.engines.registry import backend as choose
from qkit.engines.tuning import RunsCommands
from qkit.storage.read import read_folder
from qkit.training.folder import check_out, locked, run_folder_of

ADAPTERS = "adapters"  #: the folder for the command's own files, in the run folder


@dataclass(frozen=True, slots=True)
class Shipped:
    """How many layers are quantized, and how many of them have other codes than before training."""

    quantized_layers: int
    changed_layers: int


def run_mlx_lora(model: Path, out: Path, recipe: str, arguments: Sequence[str], *, packed: bool = False) -> Shipped:
    """Trains the model in `model` by `mlx_lm.lora`, or by `mlx_lm_lora.train`, and saves it in `out`.

    Args:
        arguments: of the command. It is mlx-lm-lora's if `--train-mode` or `--train-type` is among them.
        packed: whether adapters train on packed codes, and not on prepared weights.

    Raises:
        RunError: the command refuses its arguments, or quantizes the model itself.
        BackendError: the command is not installed.
        ArtifactError, RecipeError, GridError, StageError: as their causes.
    """
    read_folder(model)  # its headers: a directory that is not there is named before any work
    check_out(out, replace=False)
    engine = require(choose("mlx"), RunsCommands)
    sums: dict[str, int] = {}

    def prepare(loaded: object) -> object:
        made = (pipeline.convert if packed else pipeline.prepare)(loaded, recipe, backend=engine)
        sums.update(_sums(engine, made))
        return made

    folder = run_folder_of(out)
    with locked(folder):
        place = folder / ADAPTERS
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        trained = engine.run_command(model, arguments, place, prepare)
        if any(layer.wrapper or layer.adapter for layer in engine.layers(trained)):
            trained = adapters.merge(trained, backend=require(engine, Adapts))
        changed = count_changes(sums, _sums(engine, trained))
        if not packed:
            trained = pipeline.convert(trained, backend=engine)
        save(trained, out, source=model, backend=engine)
    return Shipped(len(sums), changed)


def _sums(engine: Modules, model: Any) -> dict[str, int]:
    """A checksum of the codes of each prepared or converted layer, by path."""
    packed = [layer for layer in engine.layers(model) if layer.stage == "converted" and not layer.adapter]
    found = {layer.bare or layer.path: _sum(engine, layer.module) for layer in packed}
    return {**code_sums(model, backend=engine), **found}


def _sum(engine: Modules, module: Any) -> int:
    return zlib.crc32(engine.to_numpy(engine.unpack(module).codes).tobytes())
