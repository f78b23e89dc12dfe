"""Text as byte-level tokens, cut into windows. The same windows on every engine, from the seed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.errors import QkitError

Tokens = NDArray[np.int32]


def read_bytes(files: Iterable[Path], *, limit: int) -> Tokens:
    """The bytes of `files` one after another, as tokens 0 .. 255 [n], at most `limit` of them.

    Raises:
        QkitError: there is nothing in them.
    """
    parts: list[NDArray[np.uint8]] = []
    size = 0
    for file in files:
        if size >= limit:
            break
        parts.append(np.frombuffer(file.read_bytes(), np.uint8))
        size += parts[-1].size
    if not size:
        raise QkitError("there is no text to train on: every file is empty or missing")
    return np.concatenate(parts)[:limit].astype(np.int32)


def windows(tokens: Tokens, *, batch: int, length: int, seed: int) -> Iterator[Tokens]:
    """Endless batches [batch, length + 1] from random places of `tokens` [n].

    Raises:
        QkitError: the text is shorter than one window.
    """
    room = _room(tokens, length)
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, room, size=batch)
        yield tokens[starts[:, None] + np.arange(length + 1)]


def held_out(tokens: Tokens, *, rows: int, length: int) -> Tokens:
    """`rows` windows [rows, length + 1] at even distances over `tokens` [n].

    Raises:
        QkitError: the text is shorter than one window.
    """
    starts = np.linspace(0, _room(tokens, length) - 1, rows).astype(np.int64)
    cut: Tokens = tokens[starts[:, None] + np.arange(length + 1)]
    return cut


def _room(tokens: Tokens, length: int) -> int:
    room = tokens.size - length
    if room < 1:
        raise QkitError(
            f"the text has {tokens.size} tokens, less than one window of {length + 1}: give more, or a shorter length"
        )
    return room
