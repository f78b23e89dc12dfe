"""The training loop for any engine: the data of a step, its learning rate, and its report."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qkit.engines.trainer import TopLogits, Trainer, count_learned
from qkit.errors import DivergedError
from qkit.training.data import Mask, Sequences, Tokens


@dataclass(frozen=True, slots=True)
class Step:
    """The report of one step: its number from 1, the loss before it in nats per token, its learning rate, and its tokens."""

    number: int
    loss: float
    learning_rate: float
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """The data of each step: `accumulation` micro-batches of `batch` sequences of `data`, in an order from `seed`.

    `top` returns a teacher's logits for sequences by their numbers, if there is a file of them.
    """

    data: Sequences
    batch: int
    accumulation: int
    seed: int
    top: Callable[[Sequence[int]], TopLogits] | None = None

    def at(self, step: int) -> tuple[list[Tokens], list[TopLogits], list[Mask]]:
        """The micro-batches [batch, length + 1] of a step, their targets and their masks: the same at every call."""
        size = self.batch * self.accumulation
        numbers = self.data.numbers(step, size=size, seed=self.seed).reshape(self.accumulation, self.batch)
        masks = [self.data.mask(part) for part in numbers]
        return (
            [self.data.rows(part) for part in numbers],
            [self.top(part.tolist()) for part in numbers] if self.top else [],
            [mask for mask in masks if mask is not None],
        )


def train(
    trainer: Trainer,
    order: Order,
    *,
    first: int,
    last: int,
    rate: Callable[[int], float],
    before: Callable[[int], None],
) -> Iterator[Step]:
    """Takes steps `first` to `last`, one for each item of the iterator. Only `trainer` has state between steps.

    Args:
        rate: the learning rate of a step.
        before: called with the number of each step, before it: see `schedule.switching`.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    for number in range(first, last + 1):
        before(number)
        batches, targets, masks = order.at(number)
        learning_rate = rate(number)
        loss = trainer.step(batches, learning_rate=learning_rate, targets=targets, masks=masks)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {number}: lower the learning rate (now {learning_rate:g})")
        yield Step(number, loss, learning_rate, count_learned(batches, masks))
