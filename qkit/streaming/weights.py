"""The weights in a stored tensor, read block by block of rows: one of a layer, or those of the experts that it stacks."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.experts import Member
from qkit.formats.row_blocks import row_blocks
from qkit.sources.encoded import Encoded
from qkit.sources.grids import member_rows
from qkit.storage.layout import DTYPES
from qkit.storage.read import Stored
from qkit.streaming.blocks import check_codable
from qkit.streaming.plan import Row

Extremes = tuple[float, float]


class Reader:
    """Reads parts of one tensor into one buffer."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._opened = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = np.empty(0, np.uint8)

    def read(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` of the tensor, valid until the next call.

        Raises:
            ArtifactError: the file has become shorter.
        """
        if self._buffer.size < end - begin:
            self._buffer = np.empty(end - begin, np.uint8)
        data, got = self._buffer[: end - begin], 0
        while got < data.size:
            count = os.preadv(self._opened, [data[got:].data], self.stored.begin + begin + got)
            if not count:
                raise ArtifactError(f"{name_of(self.stored)} ends early: the file has changed since it was opened")
            got += count
        return data

    def close(self) -> None:
        """Closes the file."""
        os.close(self._opened)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight [outputs, inputs] of a stored tensor: the whole of it, or the projection of one expert."""

    row: Row
    reader: Reader
    expert: int = 0
    projection: str = ""

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Blocks of rows, each with the number of its first row. A block is valid until the next one is read."""
        row, n = self.row, self.row.shape[1]
        for begin, end in row_blocks(row.shape):
            w = self._rows(begin, end)
            check_codable(w, name=self._name(), first=begin * n, shape=row.shape)
            yield begin, w

    def extremes(self, *, shared: bool) -> Extremes:
        """Lowest and highest value; with `shared`, of all weights that share a tensor scale with this one."""
        row, member = self.row, self.row.member
        if member is None or member.expert is not None:
            found = [_extremes_of(stored) for stored in (row.fused if shared else ()) or [row.stored]]
        else:
            names = member.projections if shared else (self.projection,)
            found = [Weight(row, self.reader, self.expert, name).own_extremes() for name in names]
        return min(low for low, _ in found), max(high for _, high in found)

    def own_extremes(self) -> Extremes:
        """Lowest and highest value."""
        found = [(float(x.min()), float(x.max())) for _, w in self.blocks() for x in [w.astype(np.float32)]]
        return min(low for low, _ in found), max(high for _, high in found)

    def _rows(self, begin: int, end: int) -> NDArray[Any]:
        row, member = self.row, self.row.member
        n, size = row.shape[1], DTYPES[row.stored.slot.dtype][1]
        if isinstance(row.stored, Encoded):
            return _decoded(row.stored, begin, end, member, self.expert, self.projection)
        if member is None or member.expert is not None:
            first = 0
        elif (
            member.transposed or member.interleaved
        ):  # rows are apart: the file is mapped, and no buffer of ours holds it
            return np.ascontiguousarray(member.matrix(row.stored.mapped(), self.expert, self.projection)[begin:end])
        else:
            place = self.expert * len(member.projections) + member.projections.index(self.projection)
            first = place * row.shape[0]
        data = self.reader.read((first + begin) * n * size, (first + end) * n * size)
        return data.view(row.dtype).reshape(end - begin, n)

    def _name(self) -> str:
        member = self.row.member
        of_stack = f", {self.projection} of expert {self.expert}," if member and member.expert is None else ""
        return f"{name_of(self.row.stored)}{of_stack}"


def weights_of(row: Row, reader: Reader) -> Iterator[Weight]:
    """The weights in the tensor of `row`, in the order of `Row.paths`."""
    if row.member is None:
        yield Weight(row, reader)
        return
    for expert, projection in row.member.paths:
        yield Weight(row, reader, expert, projection)


def name_of(stored: Stored) -> str:
    """The file and the name of a tensor, for messages."""
    return f"{stored.file}: {stored.slot.name}"


def _decoded(
    stored: Encoded, begin: int, end: int, member: Member | None, expert: int, projection: str
) -> NDArray[Any]:
    """Rows of a weight that another program's codes hold. A stack of experts has those of gate and up one after the other,
    or in turn; its codes are [outputs, inputs] for each expert, whichever way its float tensor lies."""
    if member is None or member.expert is not None:
        return stored.rows(slice(begin, end))
    mine = range(*member_rows(member, projection).indices(stored.matrix[0]))[begin:end]
    return stored.rows(slice(mine.start, mine.stop, mine.step), expert)


@lru_cache(maxsize=16)  # a process quantizes several of the weights that share a scale
def _extremes_of(stored: Stored) -> Extremes:
    reader = Reader(stored)
    try:
        return Weight(Row(stored, "", "", None, "", ()), reader).own_extremes()
    finally:
        reader.close()
