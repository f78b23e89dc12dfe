"""A run from directory to artifact: opens the model, trains with checkpoints, converts, saves, and measures the artifact."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import qkit
from qkit.artifact.snapshot import Snapshot
from qkit.code_changes import code_sums, count_changes, warn_of_no_change
from qkit.engines.protocol import Trains
from qkit.engines.trainer import Trainer, TrainerOptions
from qkit.errors import DivergedError, RunError
from qkit.rules import Rule
from qkit.switches import calibrating
from qkit.training import checkpoint
from qkit.training.begin import source_of
from qkit.training.beside import factor_at, steps_beside, switching_parts
from qkit.training.best import Evaluations, best_step, evaluations_of, waited
from qkit.training.data import Sequences
from qkit.training.finish import Outcome, finish, held_out_loss
from qkit.training.folder import Log, check_out, check_same, locked, read_log, run_folder_of
from qkit.training.inputs import Tell, check_files, engine_of, teacher_of, text_of
from qkit.training.loop import Order, train
from qkit.training.model import describe, digest, dtype_of, open_to_train
from qkit.training.rates import rate, warmup_steps
from qkit.training.run import Run, run_table
from qkit.training.schedule import rules_by_path, switching
from qkit.training.teacher import read_top
from qkit.training.text import vocabulary_of
from qkit.training.tuning import tune_model

CALIBRATION = 8  #: batches that find static ranges before the first step


def train_model(run: Run, *, tell: Tell = lambda event: None, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Carries out `run`. An interrupted run resumes from its last checkpoint.

    With `run.method`, another library carries out the steps: see `tune_model`.

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
    if run.method:
        return tune_model(run, tell=tell, stop=stop)
    check_out(run.out, replace=run.replace)
    check_files(run)
    engine, folder = engine_of(run), run_folder_of(run.out)
    with locked(folder):
        source = source_of(run)
        model, recipe = open_to_train(engine, source, run)
        sums = code_sums(model, backend=engine)
        data, unseen, kind = text_of(run, source)
        _want_held_out(run, unseen)
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

        start = {"steps": steps, "tokens": kind, "held_out": len(unseen), "backend": engine.name}
        record("resume" if found else "start", found.step if found else 0, **start, run=about["run"])
        parts = _Parts(run, engine, model, trainer, order, unseen, folder, about, rules_by_path(engine, model))
        taken, seconds = _train(parts, found, evaluations_of(read_log(log.file)), record, stop)
        best = best_step(evaluations_of(read_log(log.file))) if run.load_best_model_at_end else None
        if best is not None and best != taken:
            trainer.restore(checkpoint.of_step(folder, best).state)
        after = code_sums(model, backend=engine)
        shown = unseen if len(unseen) else order.data
        few = shown.rows(shown.chosen[:1])[:, :-1]
        outcome = finish(run, engine, model, few, log, seconds, unseen=unseen, dtype=dtype_of(source))
        changed = count_changes(sums, after)
        outcome = replace(outcome, quantized_layers=len(sums), changed_layers=changed, best_step=best)
        warn_of_no_change(sums, after, rate=run.learning_rate, stacklevel=2)
        end(taken, **asdict(outcome))
        return outcome


def _want_held_out(run: Run, unseen: Sequences) -> None:
    if (run.load_best_model_at_end or run.early_stopping_patience) and not len(unseen):
        key = "load_best_model_at_end" if run.load_best_model_at_end else "early_stopping_patience"
        raise RunError(
            f"{key} needs held-out text to evaluate on, and the data is too short to leave some out: give held_out"
        )


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


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """The parts of a run that do not change while it trains. `rules` are those of its own recipe, by path."""

    run: Run
    engine: Trains
    model: Any
    trainer: Trainer
    order: Order
    unseen: Sequences
    folder: Path
    about: Mapping[str, Any]
    rules: Mapping[str, Rule | None]

    def held_out_loss(self) -> float:
        return held_out_loss(self.engine, self.model, self.unseen, self.rules)

    def evaluates(self, step: int) -> bool:
        """Whether the run evaluates after `step`."""
        every = self.run.evaluate_every
        return len(self.unseen) > 0 and (step == self.run.steps or (every is not None and step % every == 0))

    def is_out_of_patience(self, evaluations: Evaluations) -> bool:
        """Whether early stopping ends the run after these evaluations."""
        run = self.run
        first, threshold = run.quantization.first_own, run.early_stopping_threshold
        patience = run.early_stopping_patience
        return patience is not None and waited(evaluations, first=first, threshold=threshold) >= patience

    def write(self, evaluations: Evaluations) -> Path:
        """Writes a checkpoint. With `load_best_model_at_end`, those of the best evaluations stay."""
        best = partial(best_step, evaluations) if self.run.load_best_model_at_end else None
        return checkpoint.write(self.folder, self.trainer.state(), about=self.about, best=best)


def _train(
    parts: _Parts,
    found: checkpoint.Checkpoint | None,
    before: Evaluations,
    record: Callable[..., None],
    stop: Callable[[], bool],
) -> tuple[int, float]:
    """Trains from the checkpoint `found`, after the evaluations `before`. Returns the last step, and the seconds that it took."""
    run, began, evaluations = parts.run, found.step if found else 0, list(before)
    assert run.steps is not None

    def evaluate(step: int) -> None:
        evaluations.append((step, parts.held_out_loss()))
        record("evaluation", step, loss=evaluations[-1][1])

    def write(step: int) -> None:
        record("checkpoint", step, file=str(parts.write(evaluations)))

    warmup, spent, tokens, last = warmup_steps(run.warmup, run.steps), 0.0, 0, began
    if len(parts.unseen) and not evaluations and began == 0:
        evaluate(0)
        if run.load_best_model_at_end:
            write(0)
    if parts.is_out_of_patience(evaluations):  # it was killed after its last step
        record("early_stop", began)
        return began, spent
    layers = list(parts.engine.layers(parts.model))
    beside = steps_beside(run.adapter, layers, run.steps)
    schedule, part = (
        switching(parts.engine, parts.model, run.quantization),
        switching_parts(parts.engine, layers, beside),
    )

    def before_step(step: int) -> None:
        schedule(step)
        part(step)

    steps = train(
        parts.trainer,
        parts.order,
        first=began + 1,
        last=run.steps,
        rate=lambda step: (
            rate(step, peak=run.learning_rate, steps=run.steps or 1, warmup=warmup, shape=run.schedule)
            * factor_at(run.adapter, layers, beside, step)
        ),
        before=before_step,
    )
    try:
        clock = perf_counter()
        for step in steps:
            last = step.number
            spent, tokens = spent + perf_counter() - clock, tokens + step.tokens
            speed = {
                "tokens_per_second": tokens / spent,
                "seconds_left": spent / (last - began) * (run.steps - last),
            }
            record("step", last, loss=step.loss, learning_rate=step.learning_rate, tokens=step.tokens, **speed)
            if parts.evaluates(last):
                evaluate(last)
            best = run.load_best_model_at_end and parts.evaluates(last) and best_step(evaluations) == last
            early = parts.evaluates(last) and parts.is_out_of_patience(evaluations)
            ends = early or last == run.steps
            stopped = not ends and last % run.quantization.interval == 0 and stop()  # values are refreshed there
            if ends or stopped or best or last % run.checkpoint_every == 0:
                write(last)
            if early and last < run.steps:
                record("early_stop", last)
            if stopped:
                record("stop", last)
                raise KeyboardInterrupt
            if ends:
                break
            clock = perf_counter()
    except DivergedError as error:
        good = sorted(parts.folder.glob(checkpoint.PATTERN))
        raise DivergedError(
            f"{error}; the last good checkpoint is {good[-1] if good else 'none: there is not one yet'}"
        ) from None
    return last, spent
