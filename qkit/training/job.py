"""A run from directory to artifact: opens the model, trains with checkpoints, converts, saves, and measures the artifact."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import qkit
from qkit import adapters, pipeline
from qkit.artifact.load import load
from qkit.artifact.save import save
from qkit.artifact.snapshot import Snapshot
from qkit.code_changes import code_sums, count_changes, warn_of_no_change
from qkit.engines.protocol import Trains
from qkit.engines.trainer import Trainer, TrainerOptions
from qkit.errors import DivergedError
from qkit.exchange.import_model import read_model
from qkit.qtensor import DType
from qkit.storage.marks import remove
from qkit.switches import calibrating
from qkit.training import checkpoint
from qkit.training.data import Sequences
from qkit.training.folder import Log, check_out, check_same, check_saved, locked, read_log, run_folder_of
from qkit.training.inputs import check_files, engine_of, teacher_of, text_of
from qkit.training.loop import Order, train
from qkit.training.model import describe, digest, dtype_of, open_to_train
from qkit.training.rates import rate, warmup_steps
from qkit.training.run import Run, run_table
from qkit.training.schedule import switching
from qkit.training.teacher import read_top
from qkit.training.text import vocabulary_of

Tell = Callable[[Mapping[str, Any]], None]  #: takes each event of the log, as plain values
CALIBRATION = 8  #: batches that find static ranges before the first step
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


def train_model(run: Run, *, tell: Tell = lambda event: None, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Carries out `run`. An interrupted run resumes from its last checkpoint.

    Asks `stop` after every step. Where it says yes, the run writes a checkpoint, tells the event `stop`, and is interrupted.

    Writes the artifact into `run.out`, and `log.jsonl` and the last two checkpoints into the run folder beside it. Merges
    adapters into the artifact, and also writes them as peft's files into `adapter` in the run folder.

    Calls `tell` with every event. It gets the last one, `end`, before the log does: a run that is killed meanwhile resumes.

    Warns if the run changed no code.

    Raises:
        KeyboardInterrupt: `stop` said yes.
        RunError: the run does not fit its model, its text, or the checkpoints in its folder.
        DivergedError: the loss or a weight is no longer finite; the message names the last good checkpoint.
        LockedError: another process trains for the same folder.
        BackendError, RecipeError, GridError, ArtifactError, OSError: as their causes.
    """
    check_out(run.out, replace=run.replace)
    check_files(run)
    engine, folder = engine_of(run), run_folder_of(run.out)
    with locked(folder):
        source = read_model(run.model)
        model, recipe = open_to_train(
            engine,
            source,
            recipe=run.recipe,
            dtype=run.dtype,
            adapter=run.adapter,
            ignore=run.ignore,
            skip_indivisible=run.skip_indivisible,
        )
        sums = code_sums(model, backend=engine)
        data, unseen, kind = text_of(run, source)
        steps = run.steps or max(1, len(data) // (run.batch * run.accumulation))
        run = replace(run, steps=steps)
        about = {
            "qkit": qkit.__version__,
            "engine": engine.name,
            "run": run_table(run),
            "recipe": describe(recipe),
            "model": digest(source),
            "text": data.digest(),
        }
        found = checkpoint.newest(folder)
        if found:
            check_same(found, about)
        trainer, order = _trainer(run, engine, model, data, source)
        if found:
            trainer.restore(found.state)
        else:
            _calibrate(engine, model, order)
        log = Log(folder, after=found.step if found else -1)

        def record(event: str, step: int, **more: Any) -> None:
            log.add({"event": event, "step": step, **more})
            tell({"event": event, "step": step, **more})

        def end(step: int, **more: Any) -> None:
            tell({"event": "end", "step": step, **more})
            log.add({"event": "end", "step": step, **more})  # last: a run that is killed before this line resumes

        began = found.step if found else 0
        start = {"steps": steps, "tokens": kind, "held_out": len(unseen), "backend": engine.name}
        record("resume" if found else "start", began, **start, run=about["run"])
        seconds = _train(run, engine, model, trainer, order, unseen, record, about, folder, began, stop)
        after = code_sums(model, backend=engine)
        outcome = _finish(run, engine, model, unseen, order, log, seconds, dtype=dtype_of(source))
        outcome = replace(outcome, quantized_layers=len(sums), changed_layers=count_changes(sums, after))
        warn_of_no_change(sums, after, rate=run.learning_rate, stacklevel=2)
        end(steps, **asdict(outcome))
        return outcome


def _trainer(run: Run, engine: Trains, model: Any, data: Sequences, source: Snapshot) -> tuple[Trainer, Order]:
    teacher = top = None
    if run.distillation and run.distillation.teacher.is_file():
        vocabulary = vocabulary_of(run.model, source.config or {})
        top = read_top(run.distillation.teacher, data, vocabulary=vocabulary)
    elif run.distillation:
        teacher = teacher_of(engine, run.distillation.teacher, source)
    options = TrainerOptions(
        weight_decay=run.weight_decay,
        betas=run.betas,
        clip=run.clip,
        offset_ratio=run.offset_learning_rate / run.learning_rate,
        seed=run.seed,
        autocast=run.autocast,
        compiled=run.compile,
        recompute=run.gradient_checkpointing,
        distillation=run.distillation.loss if run.distillation else None,
        teacher=teacher,
    )
    return engine.trainer(model, options), Order(data, run.batch, run.accumulation, run.seed, top)


def _calibrate(engine: Trains, model: Any, order: Order) -> None:
    """Finds the static ranges of the rules with `range = "calibrated"`."""
    if any(layer.rule and layer.rule.range == "calibrated" for layer in engine.layers(model)):
        with calibrating(model, backend=engine):
            for step in range(1, CALIBRATION + 1):
                for tokens in order.at(step)[0]:
                    engine.loss(model, tokens)


def _train(
    run: Run,
    engine: Trains,
    model: Any,
    trainer: Trainer,
    order: Order,
    unseen: Sequences,
    record: Callable[..., None],
    about: Mapping[str, Any],
    folder: Path,
    began: int,
    stop: Callable[[], bool],
) -> float:
    """Trains from step `began` + 1 to the last. Returns the seconds that it took."""
    assert run.steps is not None
    warmup, spent, tokens = warmup_steps(run.warmup, run.steps), 0.0, 0
    if began == 0 and len(unseen):
        record("evaluation", 0, loss=_held_out(engine, model, unseen))
    steps = train(
        trainer,
        order,
        first=began + 1,
        last=run.steps,
        rate=lambda step: rate(step, peak=run.learning_rate, steps=run.steps or 1, warmup=warmup, shape=run.schedule),
        before=switching(engine, model, run.quantization),
    )
    try:
        clock = perf_counter()
        for step in steps:
            spent, tokens = spent + perf_counter() - clock, tokens + step.tokens
            speed = {
                "tokens_per_second": tokens / spent,
                "seconds_left": spent / (step.number - began) * (run.steps - step.number),
            }
            record("step", step.number, loss=step.loss, learning_rate=step.learning_rate, tokens=step.tokens, **speed)
            last = step.number == run.steps
            if len(unseen) and (last or (run.evaluate_every and step.number % run.evaluate_every == 0)):
                record("evaluation", step.number, loss=_held_out(engine, model, unseen))
            stopped = not last and step.number % run.quantization.interval == 0 and stop()  # values are refreshed there
            if last or stopped or step.number % run.checkpoint_every == 0:
                record("checkpoint", step.number, file=str(checkpoint.write(folder, trainer.state(), about=about)))
            if stopped:
                record("stop", step.number)
                raise KeyboardInterrupt
            clock = perf_counter()
    except DivergedError as error:
        good = sorted(folder.glob(checkpoint.PATTERN))
        raise DivergedError(
            f"{error}; the last good checkpoint is {good[-1] if good else 'none: there is not one yet'}"
        ) from None
    return spent


def _finish(
    run: Run, engine: Trains, model: Any, unseen: Sequences, order: Order, log: Log, seconds: float, *, dtype: DType
) -> Outcome:
    shown = unseen if len(unseen) else order.data
    few = shown.rows(shown.chosen[:1])[:, :-1]
    difference = None
    if run.adapter:
        adapters.save(model, log.file.with_name("adapter"), base=str(run.model), backend=engine)
    if run.adapter or any(layer.stage == "prepared" for layer in engine.layers(model)):
        with _on(engine, model):
            before = engine.logits(model, few)
        model = adapters.merge(model, backend=engine) if run.adapter else model
        if any(layer.stage == "prepared" for layer in engine.layers(model)):
            model = pipeline.convert(model, backend=engine)
        difference = float(np.abs(engine.logits(model, few) - before).max())
    _save(run, engine, model, log.file.with_name("again"), dtype=dtype)
    saved = engine.loss(load(run.out, backend=engine), unseen.all) if len(unseen) else None
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


def _held_out(engine: Trains, model: Any, unseen: Sequences) -> float:
    with _on(engine, model):
        return engine.loss(model, unseen.all)


@contextmanager
def _on(engine: Trains, model: Any) -> Iterator[None]:
    """Lets every prepared layer quantize inside the block, as after conversion, whatever the schedule says."""
    off = [layer for layer in engine.layers(model) if layer.stage == "prepared" and layer.mode == "off"]
    for layer in off:
        engine.switch_mode(layer.module, "on")
    try:
        yield
    finally:
        for layer in off:
            engine.switch_mode(layer.module, "off")
