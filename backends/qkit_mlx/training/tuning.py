"""Methods of training that mlx-lm-lora carries out on a prepared model: supervised fine-tuning, DPO and ORPO."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.engines.protocol import Trains
from qkit.engines.trainer import AdamWOptions
from qkit.engines.tuning import Command, TuneOptions, Tunes
from qkit.errors import BackendError
from qkit.installation import how_to_install
from qkit_mlx.training import tuned

LIMIT = "max_recommended_working_set_size"  #: a fact of Metal's devices, which mlx-lm-lora reads on every device


class Tuning:
    """See `Tunes`."""

    def tune(self: Tunes, model: nn.Module, options: TuneOptions) -> None:
        """See `Tunes.tune`; by mlx-lm-lora."""
        try:
            from mlx_lm_lora.trainer import dpo_trainer, orpo_trainer, sft_trainer
        except ImportError as error:
            raise BackendError(
                f"method {options.method!r} needs mlx-lm-lora ({error}): {how_to_install('train-mlx')}"
            ) from None
        if options.held is not None:
            raise BackendError(
                "held_out: mlx-lm-lora has no best checkpoint and no early stopping: leave held_out and evaluate_every out, or "
                "train without a method, or on torch"
            )
        if options.autocast:
            raise BackendError("autocast: MLX has none: leave it out, and choose dtype = 'float32' or 'bfloat16'")
        rates = mx.array([options.rate(step) for step in range(1, options.steps + 1)])
        optimizer = self.adamw(
            model,
            AdamWOptions(
                _rates(rates),
                options.optimizer.betas,
                weight_decay=options.optimizer.weight_decay,
                offset_learning_rate=_rates(
                    rates * (options.optimizer.offset_learning_rate / options.optimizer.learning_rate)
                ),
            ),
        )
        mx.random.seed(options.seed)
        np.random.seed(options.seed)  # the loops draw their order from there
        done = self.tuned(options.place)
        if done:
            tuned.restore(self, model, optimizer, tuned.file_of(options.place, done))
        if options.before is not None:
            options.before(done + 1)
        shared = {
            "batch_size": options.batch,
            "iters": (options.steps - done) * options.accumulation,
            "gradient_accumulation_steps": options.accumulation,
            "max_seq_length": options.length,
            "steps_per_report": options.accumulation,
            "steps_per_save": options.steps * options.accumulation + 1,
            "adapter_file": str(options.place / "weights.safetensors"),
            "grad_checkpoint": options.recompute,
        }
        trained = {
            "model": model,
            "optimizer": optimizer,
            "training_callback": _Steps(self, model, optimizer, options, done),
        }
        with (
            suppress(_Stopped),
            (options.place / "log.txt").open("w") as log,
            redirect_stdout(log),
            redirect_stderr(log),
            any_device(),
        ):
            if options.method == "sft":
                sft_trainer.train_sft(
                    **trained,
                    train_dataset=_Rows([(list(row["input_ids"]), i) for i, row in enumerate(options.rows)]),
                    args=sft_trainer.SFTTrainingArgs(**shared),
                    loss=_masked_loss,
                    iterate_batches=partial(_masked_batches, options.rows, sft_trainer.iterate_batches),
                )
            elif options.method == "dpo":
                dpo_trainer.train_dpo(
                    **trained,
                    ref_model=options.reference.freeze(),
                    train_dataset=_Rows([_pair(row) for row in options.rows]),
                    args=dpo_trainer.DPOTrainingArgs(**shared, beta=options.beta),
                )
            else:
                orpo_trainer.train_orpo(
                    **trained,
                    train_dataset=_Rows([_pair(row) for row in options.rows]),
                    args=orpo_trainer.ORPOTrainingArgs(**shared, beta=options.beta),
                )

    def tuned(self, place: Path) -> int:
        """See `Tunes.tuned`."""
        return tuned.newest(place)

    def read_command(self, arguments: Sequence[str]) -> Command:
        """See `RunsCommands.read_command`."""
        from qkit_mlx.training import mlx_lora  # needs mlx-lm

        return mlx_lora.read_command(arguments)

    def run_command(
        self,
        command: Command,
        model: Path,
        place: Path,
        prepare: Callable[[Any], Any],
        follow: Callable[[Any], Callable[[int], None]] | None,
    ) -> nn.Module:
        """See `RunsCommands.run_command`."""
        from qkit_mlx.training import mlx_lora  # needs mlx-lm

        return mlx_lora.run_command(command, model, place, prepare, follow)


class _Rows(list[Any]):
    """Rows in the form of mlx-lm-lora's data sets."""

    def process(self, row: Any) -> Any:
        return row


class _Stopped(Exception):
    """Leaves the loop of the library after a step."""


class _Steps:
    """After each step, as mlx-lm-lora reports it: records it, writes a checkpoint, and begins the next step."""

    def __init__(self, engine: Trains, model: nn.Module, optimizer: Any, options: TuneOptions, done: int) -> None:
        self.engine, self.model, self.optimizer, self.options = engine, model, optimizer, options
        self.done, self.seen = done, 0

    def on_train_loss_report(self, report: Mapping[str, Any]) -> None:
        """Ends a step; reports come once a step."""
        options, seen = self.options, int(report["trained_tokens"])
        step = self.done + report["iteration"] // options.accumulation
        options.record(step, float(report["train_loss"]), options.rate(step), seen - self.seen)
        self.seen = seen
        if step >= options.steps:
            return
        stop = options.stop(step)
        if stop or step % options.checkpoint_every == 0:
            tuned.write(self.engine, self.model, self.optimizer, options.place, step)
            options.checkpointed(step)
        if stop:
            raise _Stopped
        if options.before is not None:
            options.before(step + 1)

    def on_val_loss_report(self, report: Mapping[str, Any]) -> None:
        """There is no such data."""


def _rates(table: mx.array) -> Any:
    """A schedule of MLX's: the rate by the number of steps before."""
    return lambda step: table[mx.minimum(step, table.size - 1).astype(mx.int32)]


def _masked_batches(
    rows: Sequence[Mapping[str, Any]], batches: Any, **options: Any
) -> Iterator[tuple[mx.array, mx.array]]:
    """The batches of the library, each with the mask of the tokens to learn [batch, length] in place of one completion's place.

    The library gives each row a number beside its tokens, which is here that of the row.
    """
    for tokens, places in batches(**options):
        masks = np.zeros(tokens.shape, np.bool_)
        for mask, (number, length) in zip(masks, np.array(places), strict=True):
            mask[:length] = rows[number]["completion_mask"][:length]
        yield tokens, mx.array(masks)


def _masked_loss(model: nn.Module, tokens: mx.array, mask: mx.array, cache: Any = None) -> tuple[mx.array, mx.array]:
    """The mean loss of the tokens in `mask`, and their number; the form of mlx-lm-lora's losses."""
    learned = mask[:, 1:]
    count = learned.sum()
    nats = nn.losses.cross_entropy(model(tokens[:, :-1], cache=cache), tokens[:, 1:]) * learned
    return nats.astype(mx.float32).sum() / count, count


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    begin = len(row["prompt_ids"])
    return {
        "chosen": row["prompt_ids"] + row["chosen_ids"],
        "rejected": row["prompt_ids"] + row["rejected_ids"],
        "chosen_prompt_length": begin,
        "rejected_prompt_length": begin,
        "preference_score": 1.0,
    }


@contextmanager
def any_device() -> Iterator[None]:
    """Lets mlx-lm-lora run without Metal: inside of the block, its limit of Metal's memory has no effect."""
    before = mx.device_info, mx.set_wired_limit
    if LIMIT not in before[0]():
        mx.device_info = lambda *_: {**before[0](), LIMIT: 0}
        mx.set_wired_limit = lambda limit: 0
    try:
        yield
    finally:
        mx.device_info, mx.set_wired_limit = before
