"""Methods of training that TRL carries out on a prepared model: supervised fine-tuning, DPO and ORPO."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qkit.engines.tuning import TuneOptions, Tunes
from qkit.errors import BackendError
from qkit.installation import how_to_install

QUIET = "TRL_EXPERIMENTAL_SILENCE"  #: silences TRL's note that its ORPO may change


class Tuning:
    """See `Tunes`."""

    def tune(self: Tunes, model: nn.Module, options: TuneOptions) -> None:
        """See `Tunes.tune`; by TRL."""
        try:
            with _quiet():
                from datasets import Dataset, disable_progress_bars, enable_progress_bars
                from transformers import AutoTokenizer, EarlyStoppingCallback, PrinterCallback
                from transformers.utils import logging

                trainer, config = _trainer_of(options.method)
        except ImportError as error:
            raise BackendError(
                f"method {options.method!r} needs TRL ({error}): {how_to_install('train-torch')}"
            ) from None
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
        if options.method != "sft" and tokenizer.eos_token is None:
            raise BackendError(
                f"TRL ends each answer with the tokenizer's eos_token, and {options.tokenizer} names none: name one in "
                "tokenizer_config.json"
            )
        if tokenizer.pad_token is None:  # padded tokens are masked, so that any token does
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        optimizer = self.adamw(model, options.optimizer)
        scheduler = LambdaLR(optimizer, lambda step: options.rate(step + 1) / options.optimizer.learning_rate)
        columns = ("input_ids", "completion_mask") if options.method == "sft" else ("prompt", "chosen", "rejected")
        rows, unseen = (
            Dataset.from_list([{name: row[name] for name in columns} for row in found])
            for found in (options.rows, options.held.rows if options.held else options.rows)
        )
        more: dict[str, Any] = {"ref_model": options.reference} if options.method == "dpo" else {}
        callbacks = [_steps(options)]
        if options.held:
            more["eval_dataset"] = unseen
        if options.held and options.held.patience:
            callbacks.append(EarlyStoppingCallback(options.held.patience, options.held.threshold))
        disable_progress_bars()
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of each checkpoint
        try:
            made = trainer(
                model,
                args=config(**_arguments(model, options)),
                train_dataset=rows,
                processing_class=tokenizer,
                callbacks=callbacks,
                optimizers=(optimizer, scheduler),
                **more,
            )
            made.remove_callback(PrinterCallback)
            if options.held:
                made.evaluate = _inside(options.held.on_own_grids, made.evaluate)
            done = self.tuned(options.place)
            made.train(resume_from_checkpoint=str(_checkpoint(options.place, done)) if done else None)
        finally:
            enable_progress_bars()
            if bars:
                logging.enable_progress_bar()

    def tuned(self, place: Path) -> int:
        """See `Tunes.tuned`; a checkpoint of the Trainer's, complete once it has its state."""
        found = (file.parent.name.removeprefix("checkpoint-") for file in place.glob("checkpoint-*/trainer_state.json"))
        return max((int(step) for step in found if step.isdigit()), default=0)


def _inside(context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*arguments: Any, **named: Any) -> Any:
        with context():
            return function(*arguments, **named)

    return inside


def _checkpoint(place: Path, step: int) -> Path:
    """The Trainer's name for the folder of a checkpoint."""
    return place / f"checkpoint-{step}"


def _trainer_of(method: str) -> tuple[Any, Any]:
    """TRL's trainer and its arguments."""
    trl: Any = import_module("trl")

    if method == "orpo":
        from trl.experimental import orpo

        return orpo.ORPOTrainer, orpo.ORPOConfig
    return (trl.SFTTrainer, trl.SFTConfig) if method == "sft" else (trl.DPOTrainer, trl.DPOConfig)


def _arguments(model: nn.Module, options: TuneOptions) -> dict[str, Any]:
    """The options under TRL's names. Every default of TRL's that changes numbers has a value here."""
    made: dict[str, Any] = {
        "output_dir": str(options.place),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.optimizer.learning_rate,
        "max_grad_norm": options.clip,
        "max_length": options.length,
        "seed": options.seed,
        "bf16": options.autocast,
        "gradient_checkpointing": options.recompute,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": options.checkpoint_every,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
    }
    if held := options.held:
        made |= {
            "eval_strategy": "steps",
            "eval_steps": held.every,
            "per_device_eval_batch_size": options.batch,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
        }
        if held.best or held.patience:  # the Trainer remembers the best evaluation that has a checkpoint
            made |= {"load_best_model_at_end": held.best, "save_steps": held.every}
    if options.method == "sft":
        return {**made, "completion_only_loss": True, "packing": options.packing, "packing_strategy": "wrapped"}
    return {**made, "beta": options.beta}


def _steps(options: TuneOptions) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        """Follows the schedule before each step, records each, and saves where it is told to stop."""

        def __init__(self) -> None:
            self.seen = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if options.before is not None:
                options.before(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step >= options.steps:
                control.should_evaluate = options.held is not None
                control.should_save = options.held is not None and options.held.best  # else the artifact follows
            elif options.stop(state.global_step):
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            options.checkpointed(state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
            if options.held is not None:
                options.held.evaluated(state.global_step, float(metrics["eval_loss"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                seen = int(logs.get("num_tokens", self.seen))
                options.record(
                    state.global_step, float(logs["loss"]), options.rate(state.global_step), seen - self.seen
                )
                self.seen = seen

    return Steps()


@contextmanager
def _quiet() -> Iterator[None]:
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before
