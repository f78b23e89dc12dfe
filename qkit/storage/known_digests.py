"""Mapped tensors and the SHA-256 that their seal states, which a copy of their bytes carries on undigested."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.storage.batches import batches, in_threads
from qkit.storage.read import Stored
from qkit.storage.seal import changed
from qkit.storage.tensor_writer import PIECE


class KnownDigests:
    """The digests of arrays, found by the place of their bytes in memory. It keeps the arrays, so that no other takes the place.

    Args:
        arrays: contiguous arrays that nobody changes, such as mapped tensors, by name.
        digests: the SHA-256 that the seal states, by name of the array.
        stored: the file of each array by name, for messages.
        computed: ends of the names of arrays from which other tensors are computed.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        digests: Mapping[str, str],
        stored: Mapping[str, Stored],
        *,
        computed: tuple[str, ...] = (),
    ) -> None:
        self._computed = computed
        self._arrays, self._digests, self._stored = {name: arrays[name] for name in digests}, digests, stored
        self._names = {_place(arrays[name]): name for name in digests if arrays[name].nbytes}
        self._left = set(digests)

    @property
    def left(self) -> list[str]:
        """Names of the arrays whose digests nobody has carried on."""
        return [name for name in self._digests if name in self._left]

    def carry(self, block: bytes | memoryview) -> tuple[str, Stored] | None:
        """The stated digest of the array of exactly these bytes, for the seal of their copy, and their place in a file.

        None where there is no such array. Nobody compares the digest here: whoever verifies the copy does. The numbers that
        `computed` names stay in `left`, since other tensors are computed from them.
        """
        name = self._names.get(_place(np.frombuffer(block, np.uint8)))
        if name is None:
            return None
        if not name.endswith(self._computed):
            self._left.discard(name)
        return self._digests[name], self._stored[name]

    def compare(self, names: Iterable[str]) -> None:
        """Digests the arrays of these names, on all cores, and compares them.

        Raises:
            ArtifactError: the bytes of one have changed since the seal was written.
        """

        def work(batch: list[str]) -> None:
            for name in batch:
                if _digest(self._arrays[name]) != self._digests[name]:
                    raise ArtifactError(str(changed(self._stored[name])))

        in_threads(work, batches(names, lambda name: self._arrays[name].nbytes))


def _digest(array: NDArray[Any]) -> str:
    found, data = hashlib.sha256(), array.reshape(-1).view(np.uint8).data
    for begin in range(0, len(data), PIECE):
        found.update(data[begin : begin + PIECE])
    return found.hexdigest()


def _place(array: NDArray[Any]) -> tuple[int, int]:
    """Address and length in bytes."""
    return int(array.__array_interface__["data"][0]), array.nbytes
