"""SHA-256 of bytes in memory that somebody has computed already, so that a copy of them is not digested again."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class KnownDigests:
    """The digests of arrays, found by the place of their bytes in memory. It keeps the arrays, so that no other takes the place.

    Args:
        arrays: contiguous arrays that nobody changes, such as mapped tensors, by name.
        digests: SHA-256 of each array by name.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], digests: Mapping[str, str]) -> None:
        self._arrays = [arrays[name] for name in digests]
        self._digests = dict(zip(map(_place, self._arrays), digests.values(), strict=True))

    def of(self, block: bytes | memoryview) -> str | None:
        """The digest of exactly these bytes; None where it is not known."""
        return self._digests.get(_place(np.frombuffer(block, np.uint8))) if self._digests else None


def _place(array: NDArray[Any]) -> tuple[int, int]:
    """Address and length in bytes."""
    return int(array.__array_interface__["data"][0]), array.nbytes
