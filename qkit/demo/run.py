"""The main job from end to end on real text: train, quantize, train on the grid, deploy, open on another engine, compare."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.load import load
from qkit.artifact.save import save
from qkit.coverage_table import coverage
from qkit.demo.other_programs import losses_in_other_programs
from qkit.demo.preset import PRESET, PRESETS, Preset, standard_library
from qkit.demo.report import write_report
from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.protocol import Arrays, Builds, Trains
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backends
from qkit.engines.registry import recipe as find_recipe
from qkit.errors import BackendError
from qkit.formats.compressed_tensors import layout
from qkit.installation import how_to_install
from qkit.planning import plan
from qkit.qtensor import QTensor
from qkit.report.place import PICTURE, REPORT, check_report
from qkit.rules import Recipe
from qkit.storage.destination import check_directory, destination
from qkit.storage.marks import check_own, remove
from qkit.storage.staging import replaced_file
from qkit.training import Run, train_model
from qkit.training.checkpoint import newest
from qkit.training.folder import LOG, read_log, run_folder_of
from qkit.training.run import FLOAT

Progress = Callable[[str, int, int, float], None]  #: stage, step, steps, loss
STAGES = ("float", "longer", "quantized")  #: folders of the trained models
FILES = {**REPORT, "result.json": b'"codes_equal"', "losses.png": PICTURE}  #: see `check_report`


@dataclass(frozen=True, slots=True)
class Result:
    """The results of the demo. Losses are nats per byte of held-out text.

    Training on the grid is more training, which helps by itself. So the demo also trains the float model longer, for as many
    steps on the same text, and counts the gain of QAT against that.

    Attributes:
        parameters: of the model.
        float_loss, ptq_loss: of the float model, and of the same model quantized without training.
        longer_float_loss, longer_ptq_loss: the same two after the extra steps in float.
        qat_loss: of the float model after the extra steps on the grid, converted.
        elsewhere: the name of another tool's grid, and the loss of the trained weights on it. None: there is no such grid.
        codes_equal, codes_compared: of the codes, scales and zero points that every engine computes from the trained weights,
            how many equal those in the artifact, and out of how many. `engines` names the engines.
        forward_difference: largest difference of a logit before and after `convert`.
        outside: the loss of the artifact in other programs, in processes that cannot import qkit; or the obstacle as a text.
        other_loss: the loss of the artifact on `other`. None: no second engine can build the model; `other_obstacle` says why.
    """

    backend: str
    recipe: str
    parameters: int
    float_loss: float
    ptq_loss: float
    longer_float_loss: float
    longer_ptq_loss: float
    qat_loss: float
    elsewhere: tuple[str, float] | None
    engines: tuple[str, ...]
    codes_equal: int
    codes_compared: int
    forward_difference: float
    other: str | None
    other_loss: float | None
    other_obstacle: str
    outside: dict[str, float | str]
    bits_per_weight: float
    curves: dict[str, list[tuple[int, float]]]
    folder: str

    @property
    def recovered(self) -> float | None:
        """The share of the cost of quantizing (PTQ, trained as long, less float) that training on the grid won back.

        The cost is counted from the better float model: one that training longer made worse is no baseline. None: quantizing
        cost nothing.
        """
        cost = self.longer_ptq_loss - min(self.float_loss, self.longer_float_loss)
        return (self.longer_ptq_loss - self.qat_loss) / cost if cost > 0 else None


def run(*, backend: str | None, recipe: str, folder: Path, progress: Progress, preset: Preset | None = None) -> Result:
    """Trains a small Llama on the standard library's source, quantizes it, trains it on the grid and converts it, on `backend`.

    Writes into `folder` the Hugging Face directories `float/`, `quantized/` and `mlx/`, `result.json`, and the report of `qkit
    compare`: `report.html` and `report.json`. Checks the recipe and the engines before the training. Without `preset`, the run
    takes that of the engine.

    Raises:
        BackendError: the engine, or what it needs to build a Llama, is missing.
        RecipeError, GridError: the recipe is unknown or does not fit.
        ArtifactError: the artifact has no layout for a grid of the recipe, or `folder` holds what qkit did not write.
    """
    _check_folder(folder)
    engine = require(choose(backend), Trains)
    grid_recipe, preset = find_recipe(recipe), preset or PRESETS.get(engine.name, PRESET)
    model = engine.build(preset.config)
    _check(engine, model, grid_recipe)
    others = [
        choose(status.name) for status in backends() if status.ready and status.name not in ("numpy", engine.name)
    ]
    other, other_obstacle = _second(engine, preset)
    text, unseen = standard_library(preset)

    start = folder / "start"
    save(model, start, backend=engine)
    (start / "config.json").write_text(json.dumps(preset.config, indent=2) + "\n")
    stage = partial(_train, engine, folder, text, preset, progress)
    curves = {"float": stage("float", "float", source="start", recipe=FLOAT)}
    curves["float, longer"] = stage("float, longer", "longer", source="float", recipe=FLOAT)
    curves["QAT"] = stage("QAT", "quantized", source="float", recipe=recipe)
    found = write_report(engine, folder, grid_recipe, unseen)
    losses = {row.name: row.loss.value for row in found.rows}
    model = load(folder / "quantized", backend=engine)

    codes = {
        layer.path: engine.unpack(layer.module).map(engine.to_numpy) for layer in engine.layers(model) if layer.rule
    }
    trained = newest(run_folder_of(folder / "quantized"))
    assert trained is not None
    master_weights = {path: np.array(trained.state[f"weights.{path}.weight"]) for path in codes}
    equal, compared = compare([choose("numpy"), engine, *others], master_weights, codes)
    result = Result(
        backend=engine.name,
        recipe=grid_recipe.name,
        parameters=sum(x.size for name, x in trained.state.items() if name.startswith("weights.")),
        float_loss=losses["float"],
        ptq_loss=losses["PTQ"],
        longer_float_loss=losses["float, longer"],
        longer_ptq_loss=losses["longer PTQ"],
        qat_loss=losses["QAT"],
        elsewhere=next(((row.grid, row.loss.value) for row in found.rows if row.name.startswith("QAT on")), None),
        engines=("numpy", engine.name, *(candidate.name for candidate in others)),
        codes_equal=equal,
        codes_compared=compared,
        forward_difference=_outcome(folder / "quantized")["forward_difference"],
        other=other.name if other else None,
        other_loss=other.loss(load(folder / "quantized", backend=other), unseen) if other else None,
        other_obstacle=other_obstacle,
        outside=losses_in_other_programs(folder / "quantized", folder / "mlx", unseen),
        bits_per_weight=coverage(model).bits_per_weight,
        curves=curves,
        folder=str(folder),
    )
    for left in (folder / "start", folder / "longer", *(run_folder_of(folder / name) for name in STAGES)):
        _remove(left)
    with replaced_file(folder / "result.json") as aside:
        aside.write_text(json.dumps({**asdict(result), "recovered": result.recovered}, indent=2) + "\n")
    return result


def compare(
    engines: Sequence[Arrays], master_weights: dict[str, Any], codes: dict[str, QTensor[Any]]
) -> tuple[int, int]:
    """How many codes, scales and zero points that `engines` compute from `master_weights` equal `codes`; and of how many."""
    equal = compared = 0
    for engine in engines:
        for path, stored in codes.items():
            q = engine.quantize(engine.from_numpy(master_weights[path]), stored.grid).map(engine.to_numpy)
            for name, array in stored.parts().items():
                equal += int((q.parts()[name] == array).sum())
                compared += array.size
    return equal, compared


def _check_folder(folder: Path) -> None:
    """Refuses, before any work, to replace or remove anything in `folder` that qkit did not write."""
    for name in (*STAGES, "start", "mlx"):
        check_directory(folder / name)
    for name in STAGES:
        check_own(destination(run_folder_of(folder / name)).path, folders=True)
    check_report(folder, FILES)


def _remove(folder: Path) -> None:
    """Removes a folder of a stage that the demo no longer needs. Files in it that qkit did not write stay."""
    with suppress(OSError):
        remove(destination(folder).path)


def _check(engine: Builds, model: Any, recipe: Recipe) -> None:
    """Raises before the training the errors that `prepare` and `save` would raise after it."""
    plan(engine.layers(model), recipe)
    want_honored(engine, recipe.rules, "prepare")
    for rule in recipe.rules:
        for grid in (rule.weight, rule.activation):
            if grid:
                layout(grid)


def _second(first: Builds, preset: Preset) -> tuple[Builds | None, str]:
    """The first engine besides `first` and NumPy that can build the model; or None, and the obstacle as a text."""
    obstacles = []
    for status in backends():
        if status.name in ("numpy", first.name):
            continue
        if not status.ready:
            obstacles.append(f"{status.name} {status.reason}")
            continue
        engine = choose(status.name)
        if not offers(engine, Builds):
            obstacles.append(f"{status.name} cannot run a language model")
            continue
        try:
            engine.build(preset.config)
        except BackendError as error:
            obstacles.append(f"{status.name}: {error}")
            continue
        return engine, ""
    return None, "; ".join(obstacles) or f"there is no second engine: {how_to_install('cuda')}, {how_to_install('mac')}"


def _train(
    engine: Builds,
    folder: Path,
    text: list[str],
    preset: Preset,
    progress: Progress,
    stage: str,
    out: str,
    *,
    source: str,
    recipe: str,
) -> list[tuple[int, float]]:
    """Runs `qkit train` from `folder/source` to `folder/out`, and returns its losses by step."""
    first, curve = source == "start", list[tuple[int, float]]()
    run = Run(
        model=folder / source,
        out=folder / out,
        data=tuple(text),
        recipe=recipe,
        backend=engine.name,
        steps=preset.float_steps if first else preset.more_steps,
        batch=preset.batch,
        length=preset.length,
        learning_rate=preset.float_rate if first else preset.more_rate,
        schedule="cosine",
        warmup=20,
        weight_decay=0.1 if first else 0.0,
        betas=(0.9, 0.95),
        seed=0 if first else 1,
        replace=True,
    )

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            curve.append((event["step"], event["loss"]))
            progress(stage, event["step"], run.steps or 0, event["loss"])

    _remove(run_folder_of(run.out))  # of a demo that was interrupted
    train_model(run, tell=tell)
    return curve


def _outcome(out: Path) -> dict[str, Any]:
    """The last event in the log of the run that wrote `out`."""
    return read_log(run_folder_of(out) / LOG)[-1]
