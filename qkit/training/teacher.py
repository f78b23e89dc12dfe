"""A file of a teacher's largest logits: written once, and read by every run on the same text instead of running the teacher."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkit.engines.protocol import Builds
from qkit.engines.trainer import TopLogits
from qkit.errors import ArtifactError, RunError
from qkit.storage.arrays import read_file
from qkit.storage.destination import check_file
from qkit.storage.staging import whole_file
from qkit.training.data import Sequences

KEY = "qkit_teacher"  #: the one metadata key: the digest of the sequences
LOGITS = 1 << 24  #: the most logits that one call of the teacher computes

Tick = Callable[[int, int], None]  #: takes the number of sequences that are done, and of all


def write_top(
    engine: Builds, teacher: Any, data: Sequences, file: Path, *, k: int, tick: Tick = lambda done, of: None
) -> None:
    """Writes the `k` largest logits of `teacher` at every position of `data` as safetensors. `file` is complete or absent.

    `logits` is float32 [sequences, length, k], in falling order, and `tokens` int32 of the same shape. The metadata have the
    digest of `data`.

    Raises:
        RunError: `k` is more than the vocabulary, or less than 1; or `file` exists.
        ArtifactError, PlanError: no file can be written there; see `check_file`.
    """
    from safetensors.numpy import save_file  # here, so that commands start fast

    check_absent(file)
    vocabulary = engine.logits(teacher, data.rows(data.chosen[:1])[:, :1]).shape[-1]
    if not 1 <= k <= vocabulary:
        raise RunError(f"top is {k}: the teacher has {vocabulary} logits")
    shape, many = (len(data), data.length, k), max(1, LOGITS // (data.length * vocabulary))
    logits, tokens = np.empty(shape, np.float32), np.empty(shape, np.int32)
    for begin in range(0, len(data), many):
        rows = data.rows(data.chosen[begin : begin + many])
        found = engine.logits(teacher, rows[:, :-1])
        best = np.argsort(-found, axis=-1, kind="stable")[..., :k]
        tokens[begin : begin + many] = best
        logits[begin : begin + many] = np.take_along_axis(found, best, axis=-1)
        tick(min(begin + many, len(data)), len(data))
    with whole_file(file) as aside:
        save_file({"logits": logits, "tokens": tokens}, aside, metadata={KEY: data.digest()})


def check_absent(file: Path) -> None:
    """Refuses an unusable `file` for logits, before any work.

    Raises:
        RunError: `file` exists.
        ArtifactError, PlanError: no file can be written there; see `check_file`.
    """
    if os.path.exists(file):  # which accepts names that are too long
        raise RunError(f"{file} is there already: remove it, or choose another name")
    check_file(file)


def read_top(file: Path, data: Sequences, *, vocabulary: int) -> Callable[[Sequence[int]], TopLogits]:
    """A function from numbers of sequences of `data` to their logits, which it reads from the memory-mapped file.

    Raises:
        ArtifactError: `write_top` did not write the file.
        RunError: the file is of other sequences, or of a teacher with tokens beyond `vocabulary`.
    """
    arrays, metadata = read_file(file)
    shapes = {name: (array.dtype.name, array.ndim) for name, array in arrays.items()}
    if KEY not in metadata or shapes != {"logits": ("float32", 3), "tokens": ("int32", 3)}:
        raise ArtifactError(f"{file} is no file of a teacher's logits: qkit teach makes one")
    if metadata[KEY] != data.digest():
        raise RunError(
            f"{file} is of another text, or of sequences of another length: make it from the data of this run"
        )
    largest = int(arrays["tokens"].max(initial=-1))
    if largest >= vocabulary:
        raise RunError(
            f"{file} has logits of token {largest}, and the model a vocabulary of {vocabulary}: use its teacher's"
        )
    places = {int(number): place for place, number in enumerate(data.chosen)}

    def top(numbers: Sequence[int]) -> TopLogits:
        rows = [places[number] for number in numbers]
        return TopLogits(arrays["logits"][rows], arrays["tokens"][rows])

    return top
