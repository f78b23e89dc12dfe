"""Another tool's training command on a model of qkit's: prepares the model, calls the command, and ships the result."""

import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit import adapters, pipeline
from qkit.artifact.save import save
from qkit.code_changes import code_sums, count_changes
from qkit.engines.abilities import require
from qkit.engines.protocol import Adapts, Modules
from qkit.engines.registry import backend as choose
from qkit.engines.registry import recipe as find_recipe
from qkit.engines.tuning import Command, Quantizer, RunsCommands
from qkit.errors import QkitError, RunError
from qkit.overrides import overridden
from qkit.rules import Recipe
from qkit.storage.read import read_folder
from qkit.training.folder import check_out, locked, run_folder_of
from qkit.training.schedule import Schedule, switching

HOOK = "int4-g64-absmax"  #: the recipe of mlx-lm-lora's hook at 4 bits and groups of 64
ADAPTERS = "adapters"  #: the folder for the command's own files, in the run folder


@dataclass(frozen=True, slots=True)
class Shipped:
    """The artifact; how many layers are quantized, and how many of them have other codes than before training."""

    folder: Path
    quantized_layers: int
    changed_layers: int


def run_mlx_lora(
    model: Path | None,
    out: Path | None,
    recipe: str | None,
    arguments: Sequence[str],
    *,
    packed: bool = False,
    skip_indivisible: bool = False,
) -> Shipped:
    """Trains a model by `mlx_lm.lora`, or by `mlx_lm_lora.train`, and saves it.

    Args:
        model, out: the directories of the float model and of the artifact. None: those of the arguments `--model` and
            `--adapter-path`.
        recipe: a name or a file. None: the grid that mlx-lm-lora's own options name, see `recipe_of`.
        arguments: of the command. It is mlx-lm-lora's if an option that only it has is among them.
        packed: whether adapters train on packed codes, and not on prepared weights.
        skip_indivisible: see `overridden`.

    Raises:
        RunError: the command refuses its arguments, or quantizes the model as well as the recipe.
        BackendError: the command is not installed.
        ArtifactError, RecipeError, GridError, StageError: as their causes.
    """
    engine = require(choose("mlx"), RunsCommands)
    command = engine.read_command(arguments)
    model, out = model or command.model, out or command.place
    chosen, schedule, packed = _grid(command, recipe, packed)
    chosen = overridden(chosen, skip_indivisible=skip_indivisible)
    read_folder(model)  # its headers: a directory that is not there is named before any work
    check_out(out, replace=False)
    sums: dict[str, int] = {}

    def prepare(loaded: object) -> object:
        made = (pipeline.convert if packed else pipeline.prepare)(loaded, chosen, backend=engine)
        sums.update(_sums(engine, made))
        return made

    def follow(trained: object) -> Callable[[int], None]:
        return switching(engine, trained, schedule)

    folder = run_folder_of(out)
    with locked(folder):
        place = folder / ADAPTERS
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        scheduled = None if schedule == Schedule() else follow
        trained = engine.run_command(command, model, place, prepare, scheduled)
        if any(layer.wrapper or layer.adapter for layer in engine.layers(trained)):
            trained = adapters.merge(trained, backend=require(engine, Adapts))
        changed = count_changes(sums, _sums(engine, trained))
        if not packed:
            trained = pipeline.convert(trained, backend=engine)
        save(trained, out, source=model, backend=engine)
    return Shipped(out, len(sums), changed)


def _grid(command: Command, recipe: str | None, packed: bool) -> tuple[Recipe, Schedule, bool]:
    """The recipe, its schedule, and whether codes are packed; by the recipe's name, or by the command's own options."""
    asked = command.quantizer
    if asked and recipe:
        raise RunError(
            f"{asked.flag} quantizes the model, and so does the recipe {recipe!r}: leave one of them out. --recipe, with "
            "--packed for a model that is loaded in few bits, is the same"
        )
    if asked and packed:
        raise RunError(f"{asked.flag} says already whether codes are packed: leave --packed out")
    if recipe:
        return find_recipe(recipe), Schedule(), packed
    if asked is None:
        raise RunError(
            f"no recipe: name one by --recipe, or give {command.name} --qat-enable or one of --load-in-4bits, "
            "--load-in-6bits, --load-in-8bits and --load-in-mxfp4"
        )
    return recipe_of(asked), Schedule(start=asked.start, interval=asked.interval), asked.packed


def recipe_of(asked: Quantizer) -> Recipe:
    """The recipe of mlx-lm-lora's own quantizer: its hook has the scale rule `absmax`. Heads stay in float.

    Loaded models get `intN-g128`, in place of MLX's own grid with zero points, or `mxfp4-a16`.

    Raises:
        RunError: qkit has no such grid.
    """
    if asked.grid == "mxfp4":
        return find_recipe("mxfp4-a16")
    if asked.packed:
        return find_recipe(f"int{asked.bits}-g{asked.group}")
    known = find_recipe(HOOK)
    element, group = f"int{asked.bits}", asked.group or "tensor"
    changes: dict[str, Any] = {"element": element, "group": group}
    try:
        rules = tuple(
            replace(rule, weight=replace(rule.weight, **changes)) if rule.weight else rule for rule in known.rules
        )
    except QkitError as error:
        raise RunError(f"{asked.flag} with {asked.bits} bits in groups of {asked.group}: {error}") from None
    return replace(known, name=f"{element}-{f'g{group}' if asked.group else group}-absmax", rules=rules)


def _sums(engine: Modules, model: Any) -> dict[str, int]:
    """A checksum of the codes of each prepared or converted layer, by path."""
    packed = [layer for layer in engine.layers(model) if layer.stage == "converted" and not layer.adapter]
    found = {layer.bare or layer.path: _sum(engine, layer.module) for layer in packed}
    return {**code_sums(model, backend=engine), **found}


def _sum(engine: Modules, module: Any) -> int:
    return zlib.crc32(engine.to_numpy(engine.unpack(module).codes).tobytes())
