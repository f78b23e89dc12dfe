"""Tokens cut into sequences, and the sequences of each training step: a pure function of the seed and the step."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.errors import QkitError, RunError

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
EVERY = 20  #: without a held-out text, one sequence in so many is held out of training
MOST = 64  #: the most sequences that are held out in this way


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """A text cut into sequences of `length` + 1 tokens, `length` apart, so that each token is predicted once.

    Attributes:
        tokens: int32 [n].
        length: how many tokens a sequence predicts.
        chosen: numbers of the sequences that belong to this set, ascending.
        learned: bool [n], the tokens that are predicted; None: all. Each chosen sequence predicts at least one.
    """

    tokens: Tokens
    length: int
    chosen: NDArray[np.int64]
    learned: Mask | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, numbers: NDArray[np.int64]) -> Tokens:
        """The sequences with these numbers [rows, length + 1]."""
        cut: Tokens = self.tokens[numbers[:, None] * self.length + np.arange(self.length + 1)]
        return cut

    def mask(self, numbers: NDArray[np.int64]) -> Mask | None:
        """Which tokens after the first of the sequences with these numbers are predicted [rows, length]; None: all."""
        if self.learned is None:
            return None
        cut: Mask = self.learned[numbers[:, None] * self.length + np.arange(1, self.length + 1)]
        return cut

    @property
    def all(self) -> Tokens:
        """Every sequence of the set."""
        return self.rows(self.chosen)

    def numbers(self, step: int, *, size: int, seed: int) -> NDArray[np.int64]:
        """Numbers of the `size` sequences of `step`, which counts from 1. Every sequence comes once before any comes again."""
        places = np.arange((step - 1) * size, step * size)
        epochs, within = np.divmod(places, len(self))
        picked = [_order(seed, int(epoch), len(self))[place] for epoch, place in zip(epochs, within, strict=True)]
        return self.chosen[picked]

    def digest(self) -> str:
        """SHA-256 of the tokens, the length and the choice."""
        found = hashlib.sha256(f"{self.length} {self.tokens.size}".encode())
        for array in (self.tokens, self.chosen, *([] if self.learned is None else [self.learned])):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def sequences(tokens: Tokens, *, length: int, name: str, learned: Mask | None = None) -> Sequences:
    """All the sequences of `tokens` [n] that predict one of those in `learned` [n], or any. Messages call the text by `name`.

    Raises:
        RunError: the text is shorter than one sequence, or no sequence has a token to learn.
    """
    count = (tokens.size - 1) // length
    if count < 1:
        raise RunError(
            f"{name} has {tokens.size} tokens, less than one sequence of {length + 1}: give more text, or a shorter length"
        )
    return _with_any(Sequences(tokens, length, np.arange(count), learned), name)


def padded(
    tokens: Tokens, ends: NDArray[np.int64], *, length: int, name: str, learned: Mask | None = None
) -> Sequences:
    """Each row of `tokens` [n], which end at `ends`, as a sequence of its own, filled up with tokens that are not predicted.

    A row keeps its first `length` tokens. The first token of a row is never predicted.

    Raises:
        RunError: no row has a token to learn within `length`.
    """
    begins = np.concatenate([[0], ends[:-1]])
    filled, mask = np.zeros(len(ends) * length + 1, np.int32), np.zeros(len(ends) * length + 1, np.bool_)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        size, place = min(end - begin, length), row * length
        filled[place : place + size] = tokens[begin : begin + size]
        mask[place + 1 : place + size] = True if learned is None else learned[begin + 1 : begin + size]
    return _with_any(Sequences(filled, length, np.arange(len(ends)), mask), name)


def _with_any(whole: Sequences, name: str) -> Sequences:
    """`whole` without the sequences that predict nothing."""
    mask = whole.mask(whole.chosen)
    if mask is None or mask.any(axis=1).all():
        return whole
    chosen = whole.chosen[mask.any(axis=1)]
    if not len(chosen):
        raise RunError(
            f"{name} has no token to learn within sequences of {whole.length}: make length longer than the prompts, or pack rows"
        )
    return replace(whole, chosen=chosen)


def split(whole: Sequences) -> tuple[Sequences, Sequences]:
    """The training set and the held-out set. One sequence in twenty is held out, at even distances, and at most 64."""
    count = min(len(whole) // EVERY, MOST)
    apart = ((np.arange(count) + 0.5) * len(whole) / max(count, 1)).astype(np.int64)
    return replace(whole, chosen=np.delete(whole.chosen, apart)), replace(whole, chosen=whole.chosen[apart])


def read_bytes(files: Iterable[Path], *, limit: int) -> Tokens:
    """The bytes of `files` one after another, as tokens 0 .. 255 [n], at most `limit` of them.

    Raises:
        QkitError: all files are empty, or there are none.
    """
    parts: list[NDArray[np.uint8]] = []
    size = 0
    for file in files:
        if size >= limit:
            break
        parts.append(np.frombuffer(file.read_bytes(), np.uint8))
        size += parts[-1].size
    if not size:
        raise QkitError("there is no text to train on: every file is empty or missing: give data")
    return np.concatenate(parts)[:limit].astype(np.int32)
