"""A teacher's largest logits in a file, so that students need not run it: made once, read by every run on the same text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.tensors import read_file
from qkit.backend import Backend
from qkit.errors import ArtifactError, RunError
from qkit.trainer import TopLogits
from qkit.training.data import Sequences

KEY = "qkit_teacher"  #: the one metadata key: the digest of the sequences
ROWS = 16  #: sequences that the teacher reads at a time


def write_top(engine: Backend, teacher: Any, data: Sequences, file: Path, *, k: int) -> None:
    """The `k` largest logits of `teacher` at every position of `data`, as safetensors.

    `logits` float32 [sequences, length, k], falling; `tokens` int32, likewise; the digest of `data` in the metadata.

    Raises:
        RunError: `k` is more than the vocabulary, or less than 1.
    """
    from safetensors.numpy import save_file  # here, so that commands start fast

    shape = (len(data), data.length, k)
    logits, tokens = np.empty(shape, np.float32), np.empty(shape, np.int32)
    for begin in range(0, len(data), ROWS):
        rows = data.rows(data.chosen[begin : begin + ROWS])
        found = engine.logits(teacher, rows[:, :-1])
        if not 1 <= k <= found.shape[-1]:
            raise RunError(f"top is {k}: the teacher has {found.shape[-1]} logits")
        best = np.argsort(-found, axis=-1, kind="stable")[..., :k]
        tokens[begin : begin + ROWS] = best
        logits[begin : begin + ROWS] = np.take_along_axis(found, best, axis=-1)
    save_file({"logits": logits, "tokens": tokens}, file, metadata={KEY: data.digest()})


def read_top(file: Path, data: Sequences) -> Callable[[Sequence[int]], TopLogits]:
    """A function that gives the logits of sequences of `data` by their numbers; the file is mapped.

    Raises:
        ArtifactError: it is not what `write_top` writes.
        RunError: it was made from other sequences.
    """
    arrays, metadata = read_file(file)
    shapes = {name: (array.dtype.name, array.ndim) for name, array in arrays.items()}
    if KEY not in metadata or shapes != {"logits": ("float32", 3), "tokens": ("int32", 3)}:
        raise ArtifactError(f"{file} is no file of a teacher's logits: qkit.training.teach makes one")
    if metadata[KEY] != data.digest():
        raise RunError(
            f"{file} is of another text, or of sequences of another length: make it from the data of this run"
        )
    places = {int(number): place for place, number in enumerate(data.chosen)}

    def top(numbers: Sequence[int]) -> TopLogits:
        rows = [places[number] for number in numbers]
        return TopLogits(arrays["logits"][rows], arrays["tokens"][rows])

    return top
