"""The training loop, for any engine: a schedule, a step, and what it reports."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.backend import Backend
from qkit.errors import QkitError


@dataclass(frozen=True, slots=True)
class Step:
    """One step's report: its number from 1, and the loss before it in nats per token."""

    number: int
    loss: float


def train(
    engine: Backend,
    model: Any,
    batches: Iterator[NDArray[np.int32]],
    *,
    steps: int,
    learning_rate: float,
    warmup: int,
    weight_decay: float,
) -> Iterator[Step]:
    """Trains `model` in place, a step each time the iterator is advanced.

    The learning rate climbs over `warmup` steps and falls by a cosine to a tenth.

    Raises:
        QkitError: the loss is no longer finite.
    """
    trainer = engine.trainer(model, weight_decay=weight_decay)
    for number in range(1, steps + 1):
        loss = trainer.step(next(batches), learning_rate=learning_rate * schedule(number, steps=steps, warmup=warmup))
        if not math.isfinite(loss):
            raise QkitError(f"the loss is {loss} at step {number}: lower the learning rate (now {learning_rate:g})")
        yield Step(number, loss)


def schedule(number: int, *, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at step `number` of 1 .. `steps`."""
    if number <= warmup:
        return number / warmup
    progress = (number - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
