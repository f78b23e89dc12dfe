"""Runs with a method: another library carries out the steps on the prepared model, and qkit opens, checks and ships it."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from qkit.artifact.snapshot import Snapshot
from qkit.code_changes import code_sums, count_changes, warn_of_no_change
from qkit.engines.abilities import require
from qkit.engines.protocol import Trains
from qkit.engines.trainer import AdamWOptions
from qkit.engines.tuning import Held, TuneOptions, Tunes
from qkit.errors import DivergedError, RunError
from qkit.training.begin import source_of
from qkit.training.beside import factor_at, steps_beside, switching_parts
from qkit.training.best import best_step, evaluations_of
from qkit.training.checkpoint import Checkpoint
from qkit.training.finish import Outcome, finish
from qkit.training.folder import Log, check_out, check_same, locked, read_log, run_folder_of
from qkit.training.inputs import Tell, check_files, engine_of
from qkit.training.model import build_float_model, describe, digest, dtype_of, open_to_train
from qkit.training.preferences import tuning_rows
from qkit.training.rates import rate, warmup_steps
from qkit.training.run import Run, run_table
from qkit.training.schedule import Schedule, on_own_grids, rules_by_path, switching

SCRATCH = "library"  #: the folder of the library's checkpoints, in the run folder
ABOUT = "run.json"  #: the run that these checkpoints are of


def tune_model(run: Run, *, tell: Tell = lambda event: None, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Carries out `run` by its method: TRL takes the steps on torch, and mlx-lm-lora on MLX. Checks every row before the first.

    Writes the same files as `train_model`; checkpoints are those of the library, in `library` in the run folder. An interrupted
    run goes on from the last one. Asks `stop` after every step; where it says yes, a checkpoint comes before the interruption.

    Raises:
        KeyboardInterrupt: `stop` said yes.
        RunError: the run does not fit its model or its data.
        DivergedError: the loss is no longer finite.
        LockedError: another process trains for the same folder.
        BackendError, RecipeError, GridError, ArtifactError, OSError: as their causes.
    """
    check_out(run.out, replace=run.replace)
    check_files(run)
    engine, folder = require(engine_of(run), Tunes), run_folder_of(run.out)
    with locked(folder):
        source = source_of(run)
        rows = tuning_rows(run, source.config or {})
        unseen = (
            tuning_rows(replace(run, data=run.held_out), source.config or {}, purpose="held_out")
            if run.held_out
            else []
        )
        model, recipe = open_to_train(engine, source, run)
        sums = code_sums(model, backend=engine)
        size = run.batch * run.accumulation
        run = replace(run, steps=run.steps or max(1, len(rows) // size))
        assert run.steps is not None
        about = {
            "engine": engine.name,
            "run": run_table(run),
            "recipe": describe(recipe),
            "model": digest(source),
            "text": sha256(json.dumps([rows, unseen] if unseen else rows, sort_keys=True).encode()).hexdigest(),
        }
        place = folder / SCRATCH
        began = _begin(place, about, engine)
        log = Log(folder, after=began if began else -1)

        def record(event: str, step: int, **more: Any) -> None:
            log.add({"event": event, "step": step, **more})
            tell({"event": event, "step": step, **more})

        start = {"steps": run.steps, "tokens": "tokenizer.json", "held_out": len(unseen), "backend": engine.name}
        record("resume" if began else "start", began, **start, run=run_table(run))
        clock, asked = perf_counter(), _Asked(stop, run.quantization.interval)
        options = _options(run, engine, model, source, rows, place, record, asked, clock, began)
        engine.tune(model, replace(options, held=_held(run, engine, model, unseen, record) if unseen else None))
        if asked.step:
            record("stop", asked.step)
            raise KeyboardInterrupt
        events = read_log(log.file)
        taken = max(event["step"] for event in events if event["event"] == "step")
        if taken < run.steps:
            record("early_stop", taken)
        best = best_step(evaluations_of(events)) if run.load_best_model_at_end else None
        seconds, after = perf_counter() - clock, code_sums(model, backend=engine)
        few = np.arange(min(run.length, 16), dtype=np.int32)[None]
        outcome = finish(run, engine, model, few, log, seconds, dtype=dtype_of(source))
        outcome = replace(
            outcome, quantized_layers=len(sums), changed_layers=count_changes(sums, after), best_step=best
        )
        warn_of_no_change(sums, after, rate=run.learning_rate, stacklevel=3)
        record("end", taken, **asdict(outcome))
        shutil.rmtree(place)
        return outcome


def _held(run: Run, engine: Trains, model: Any, rows: list[Mapping[str, Any]], record: Callable[..., None]) -> Held:
    rules = rules_by_path(engine, model)
    return Held(
        rows=rows,
        every=run.evaluate_every or 1,
        best=run.load_best_model_at_end,
        patience=run.early_stopping_patience,
        threshold=run.early_stopping_threshold,
        on_own_grids=lambda: on_own_grids(engine, model, rules),
        evaluated=lambda step, loss: record("evaluation", step, loss=loss),
    )


class _Asked:
    """Asks once a step whether to stop, where values are refreshed. `step` is the one where the answer was yes, else 0."""

    def __init__(self, stop: Callable[[], bool], interval: int) -> None:
        self._stop, self._interval, self.step = stop, interval, 0

    def __call__(self, step: int) -> bool:
        self.step = step if step % self._interval == 0 and self._stop() else 0
        return self.step > 0


def _begin(place: Path, about: Mapping[str, Any], engine: Tunes) -> int:
    """The step of the checkpoint that the run goes on from, 0 without one. Checks that it is of the same run.

    Raises:
        RunError: the checkpoint is of another run, or of another engine.
    """
    file, began = place / ABOUT, engine.tuned(place) if place.is_dir() else 0
    if began and file.exists():
        before = dict(json.loads(file.read_text(encoding="utf-8")))
        check_same(Checkpoint(file, before, {}), about)
        if before["engine"] != engine.name:
            raise RunError(
                f"{file} is of backend {before['engine']!r}, and this is {engine.name!r}: repeat that run to finish it, or "
                f"remove {place.parent} to begin anew"
            )
        return began
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    file.write_text(json.dumps(about), encoding="utf-8")
    return 0


def _options(
    run: Run,
    engine: Trains,
    model: Any,
    source: Snapshot,
    rows: list[Mapping[str, Any]],
    place: Path,
    record: Callable[..., None],
    stop: Callable[[int], bool],
    clock: float,
    began: int,
) -> TuneOptions:
    steps = run.steps or 1
    warmup = warmup_steps(run.warmup, steps)

    def take(step: int, loss: float, learning_rate: float, tokens: int) -> None:
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}: lower the learning rate (now {learning_rate:g})")
        spent, taken = max(perf_counter() - clock, 1e-9), step - began
        speed = {"tokens_per_second": tokens * taken / spent, "seconds_left": spent / taken * (steps - step)}
        record("step", step, loss=loss, learning_rate=learning_rate, tokens=tokens, **speed)

    layers = list(engine.layers(model))
    beside = steps_beside(run.adapter, layers, steps)
    schedule, part = switching(engine, model, run.quantization), switching_parts(engine, layers, beside)

    def before(step: int) -> None:
        schedule(step)
        part(step)

    if len(rows) < run.batch:
        raise RunError(f"the data has {len(rows)} rows, fewer than a batch of {run.batch}: lower batch, or give more")
    return TuneOptions(
        method=run.method or "sft",
        rows=rows,
        tokenizer=run.model,
        reference=build_float_model(engine, source, dtype=run.dtype) if run.method == "dpo" else None,
        steps=steps,
        batch=run.batch,
        accumulation=run.accumulation,
        length=run.length,
        packing=run.packing,
        beta=run.beta,
        clip=run.clip,
        seed=run.seed,
        autocast=run.autocast,
        recompute=run.gradient_checkpointing,
        optimizer=AdamWOptions(
            run.learning_rate, run.betas, weight_decay=run.weight_decay, offset_learning_rate=run.offset_learning_rate
        ),
        rate=lambda step: (
            rate(step, peak=run.learning_rate, steps=steps, warmup=warmup, shape=run.schedule)
            * factor_at(run.adapter, layers, beside, step)
        ),
        before=None if run.quantization == Schedule() and not beside else before,
        record=take,
        place=place,
        checkpoint_every=run.checkpoint_every,
        checkpointed=lambda step: record("checkpoint", step, file=str(place)),
        stop=stop,
    )
