"""Losses and divergences window by window, from an engine's logits, in NumPy's float64 and in bounded memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.protocol import Builds
from qkit.errors import QkitError

Numbers = NDArray[np.float64]
LOGITS = 1 << 24  #: the most logits that one call of an engine computes
BLOCK = 1 << 21  #: the most logits that are in float64 at a time


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The measurements of a model on windows of text of equal length.

    Attributes:
        losses: mean next-token loss of each window in nats per token [windows].
        length: how many tokens are predicted in each window.
        kl: KL(teacher || model) in nats per token [windows]; None without a teacher.
        agreement: share of positions where both have the same likeliest token [windows]; None without a teacher.
    """

    losses: Numbers
    length: int
    kl: Numbers | None = None
    agreement: Numbers | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return self.losses.size * self.length

    @property
    def loss(self) -> float:
        """The mean loss in nats per token."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """e to the power of the loss, at most e^700."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """The loss in bits per byte of a text with so many tokens per byte."""
        return self.loss * tokens_per_byte / math.log(2)


def consecutive(tokens: NDArray[np.int32], *, length: int, windows: int | None = None) -> NDArray[np.int32]:
    """`tokens` [n] cut into windows [rows, length + 1]: each begins with the last token of the one before.

    Every token after the first is predicted once, except for a remainder at the end. `windows` limits their number: the rows
    are then at even distances.

    Raises:
        QkitError: the text is shorter than one window, or `length` or `windows` is less than 1.
    """
    if length < 1 or (windows is not None and windows < 1):
        raise QkitError(f"length is {length} and windows {windows}: give whole numbers from 1 on")
    rows = (tokens.size - 1) // length
    if rows < 1:
        raise QkitError(
            f"the text has {tokens.size} tokens, less than one window of {length + 1}: give more, or a shorter length"
        )
    chosen = np.arange(rows) if windows is None or windows >= rows else np.arange(windows) * rows // windows
    cut: NDArray[np.int32] = tokens[chosen[:, None] * length + np.arange(length + 1)]
    return cut


def evaluate(
    engine: Builds,
    model: Any,
    rows: NDArray[np.int32],
    *,
    teacher: Any = None,
    tick: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """The measurements of `model` on `rows` [windows, length + 1], with `teacher`, another model on the same engine.

    Calls `tick` with the number of windows of each block that is measured.

    Raises:
        QkitError: the two have different vocabularies, or the loss of a window is not finite.
    """
    parts = []
    for block in _blocks(engine, model, rows):
        theirs = None if teacher is None else _logits(engine, teacher, block)
        parts.append(_measure(_logits(engine, model, block), block, theirs))
        tick(len(block))
    losses, kl, agreement = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not np.isfinite(losses).all():
        raise QkitError(
            f"the loss is not a number in {np.count_nonzero(~np.isfinite(losses))} of {losses.size} windows: its "
            "logits overflow, so take a wider type or another recipe"
        )
    length = rows.shape[1] - 1
    return Evaluation(losses, length) if teacher is None else Evaluation(losses, length, kl, agreement)


def _blocks(engine: Builds, model: Any, rows: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    """`rows` in blocks of at most `LOGITS` logits. Runs the model on one token to see its vocabulary."""
    vocabulary = engine.logits(model, rows[:1, :1]).shape[-1]
    step = max(1, LOGITS // (vocabulary * (rows.shape[1] - 1)))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _logits(engine: Builds, model: Any, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    return engine.logits(model, rows[:, :-1])


def _measure(
    logits: NDArray[np.float32], rows: NDArray[np.int32], teacher: NDArray[np.float32] | None
) -> tuple[Numbers, Numbers, Numbers]:
    """Loss, divergence and agreement of each window; the last two are zeros without a teacher."""
    if teacher is not None and teacher.shape != logits.shape:
        raise QkitError(
            f"the model has a vocabulary of {logits.shape[-1]} and the teacher one of {teacher.shape[-1]}: take a "
            "teacher with the same tokenizer"
        )
    windows, length, vocabulary = logits.shape
    found = np.zeros((3, windows * length))
    flat, targets = logits.reshape(-1, vocabulary), rows[:, 1:].reshape(-1)
    flat_teacher = None if teacher is None else teacher.reshape(-1, vocabulary)
    step = max(1, BLOCK // vocabulary)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        mine = _log_softmax(flat[part])
        found[0, part] = -mine[np.arange(len(mine)), targets[part]]
        if flat_teacher is not None:
            theirs = _log_softmax(flat_teacher[part])
            found[1, part] = (np.exp(theirs) * (theirs - mine)).sum(-1)
            found[2, part] = flat[part].argmax(-1) == flat_teacher[part].argmax(-1)
    losses, kl, agreement = found.reshape(3, windows, length).mean(-1)
    return losses, kl, agreement


def _log_softmax(logits: NDArray[np.float32]) -> Numbers:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x
