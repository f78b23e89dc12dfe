"""The identity of a float model: statistics of one model say nothing of another."""

import hashlib
import json
from collections.abc import Mapping

from qkit.storage.read import Stored

SAMPLE = 1 << 12  #: bytes that are read at the beginning, in the middle and at the end of each tensor


def identity(tensors: Mapping[str, Stored]) -> str:
    """SHA-256 of names, types, shapes and samples of all tensors, the same however the files are cut.

    Samples of each tensor, since reading all bytes would cost as much as quantizing them. Any training changes every sample of a
    trained tensor; a change of single numbers by hand is not noticed.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        size = stored.slot.nbytes
        found.update(json.dumps([name, stored.slot.dtype, list(stored.slot.shape)]).encode())
        with stored.file.open("rb") as stream:
            for at in sorted({0, max(size // 2 - SAMPLE // 2, 0), max(size - SAMPLE, 0)}):
                stream.seek(stored.begin + at)
                found.update(stream.read(min(SAMPLE, size - at)))
    return found.hexdigest()
