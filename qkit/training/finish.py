"""The end of a run: merges, converts, saves and measures the model; and the outcome of all of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qkit import adapters, pipeline
from qkit.artifact.load import load
from qkit.artifact.save import save
from qkit.engines.protocol import Trains
from qkit.qtensor import DType
from qkit.rules import Rule
from qkit.storage.marks import remove
from qkit.training.data import Sequences, Tokens
from qkit.training.folder import Log, check_saved, read_log
from qkit.training.run import Run
from qkit.training.schedule import on_own_grids, rules_by_path

SMOOTH = 20  #: the most steps in the mean of the first and of the last losses


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a run. Losses are nats per token. Held-out losses are None without held-out text.

    Attributes:
        steps, tokens, seconds: steps and tokens of the whole run; seconds of training in this process.
        first_loss, last_loss: training losses, means over up to 20 steps.
        held_out_before, held_out_after: losses of the quantized model before the first and after the last step.
        held_out_saved: the loss of the artifact, opened again from the disk.
        forward_difference: the largest difference of a logit before and after `convert`. None: the run quantized nothing.
        quantized_layers, changed_layers: how many layers are quantized, and how many of them have other codes than the model
            that the run began with, put on the same grid.
        best_step: the step whose weights the artifact has, where the run chose the best evaluation; None: those of the last step.
        folder: the artifact.
        run_folder: the folder of the checkpoints and the log.
    """

    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    held_out_before: float | None
    held_out_after: float | None
    held_out_saved: float | None
    forward_difference: float | None
    folder: str
    run_folder: str
    quantized_layers: int = 0
    changed_layers: int = 0
    best_step: int | None = None


def finish(
    run: Run,
    engine: Trains,
    model: Any,
    few: Tokens,
    log: Log,
    seconds: float,
    *,
    unseen: Sequences | None = None,
    dtype: DType,
) -> Outcome:
    """Merges, converts and saves a trained model. Compares its logits on `few` tokens [rows, length] before and after."""
    difference = None
    if run.adapter:
        adapters.save(model, log.file.with_name("adapter"), base=str(run.model), backend=engine)
    if run.adapter or any(layer.stage == "prepared" for layer in engine.layers(model)):
        with on_own_grids(engine, model, rules_by_path(engine, model)):
            before = engine.logits(model, few)
        model = adapters.merge(model, backend=engine) if run.adapter else model
        if any(layer.stage == "prepared" for layer in engine.layers(model)):
            model = pipeline.convert(model, backend=engine)
        difference = float(np.abs(engine.logits(model, few) - before).max())
    _save(run, engine, model, log.file.with_name("again"), dtype=dtype)
    saved = engine.loss(load(run.out, backend=engine), unseen.all, mask=unseen.mask(unseen.chosen)) if unseen else None
    events = read_log(log.file)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    held_out = [event["loss"] for event in events if event["event"] == "evaluation"]
    few_steps = max(1, min(SMOOTH, len(losses) // 2))
    return Outcome(
        steps=len(losses),
        tokens=sum(event["tokens"] for event in events if event["event"] == "step"),
        seconds=seconds,
        first_loss=float(np.mean(losses[:few_steps])),
        last_loss=float(np.mean(losses[-few_steps:])),
        held_out_before=held_out[0] if held_out else None,
        held_out_after=held_out[-1] if held_out else None,
        held_out_saved=saved,
        forward_difference=difference,
        folder=str(run.out),
        run_folder=str(log.file.parent),
    )


def _save(run: Run, engine: Trains, model: Any, again: Path, *, dtype: DType) -> None:
    """Writes the artifact. If the same run wrote it before it was killed, only checks that the bytes are the same."""
    if run.replace or not run.out.exists() or not any(run.out.iterdir()):
        save(model, run.out, source=run.model, backend=engine, dtype=dtype)
        return
    save(model, again, source=run.model, backend=engine, dtype=dtype)
    try:
        check_saved(run.out, again)
    finally:
        remove(again)


def held_out_loss(engine: Trains, model: Any, unseen: Sequences, rules: Mapping[str, Rule | None]) -> float:
    """The loss on held-out text of the model on the grids of `rules`, whatever the schedule says."""
    with on_own_grids(engine, model, rules):
        return engine.loss(model, unseen.all, mask=unseen.mask(unseen.chosen))
