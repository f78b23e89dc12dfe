"""A quantized weight in another program's files, under the name, type and shape of its float tensor. Decoded row by row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors
from qkit.sources.law import Codes, values
from qkit.storage.layout import DTYPES
from qkit.storage.read import Stored

ROWS = 1 << 20  #: about how many numbers are decoded together


class Form(Protocol):
    """How the stored tensors of one weight lie. A frozen dataclass, so that it reaches other processes."""

    @property
    def name(self) -> str:
        """Text for people: `GPTQ, 4 bits, groups of 128`."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        ...

    @property
    def scales_in(self) -> str:
        """Name of the part with the scales of groups."""
        ...

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """The codes of some rows of one matrix; `matrix` is 0 but in a stack of experts."""
        ...


@runtime_checkable
class Valued(Protocol):
    """How the stored parts of a weight lie whose values another package decodes, so that no grid holds its codes."""

    @property
    def name(self) -> str:
        """As of `Form`."""
        ...

    def values(self, parts: Tensors, rows: slice) -> NDArray[np.float32]:
        """The values of some rows [rows, inputs], float32."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded(Stored):
    """A float tensor that the files hold as codes. `file` and `begin` are those of its codes.

    Attributes:
        form: the layout of the parts.
        parts: the stored tensors, by their names in the layout.
        transposed: whether `slot` has the inputs before the outputs, as stacks of experts do in some models.
    """

    form: Form | Valued
    parts: Mapping[str, Stored]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(part.slot.nbytes for part in self.parts.values())

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix of codes: outputs and inputs."""
        *_, rows, n = (1, *self.slot.shape)
        return (n, rows) if self.transposed else (rows, n)

    def codes(self, rows: slice = slice(None), matrix: int = 0) -> Codes:
        """The codes of some rows.

        Raises:
            ArtifactError: a part has a value that is no code or scale; or the form has values only, see `Valued`.
        """
        if isinstance(self.form, Valued):
            raise ArtifactError(
                f"{self.file}: {self.slot.name}: no grid holds the codes of {self.form.name}: read its values"
            )
        mapped = {name: part.mapped() for name, part in self.parts.items()}
        try:
            return self.form.codes(mapped, rows, matrix)
        except ArtifactError as error:
            raise ArtifactError(f"{self.file}: {self.slot.name}: {error}") from None

    def rows(self, rows: slice, matrix: int = 0) -> NDArray[Any]:
        """The values of some rows [rows, inputs], in the type of the slot: float32, rounded once.

        Raises:
            ArtifactError: see `codes`; or a value is not finite.
        """
        try:
            if isinstance(self.form, Valued):
                found = self.form.values({name: part.mapped() for name, part in self.parts.items()}, rows)
            else:
                found = values(self.codes(rows, matrix))
        except ArtifactError as error:
            raise ArtifactError(f"{self.file}: {self.slot.name}: {error}") from None
        if count := int(np.count_nonzero(~np.isfinite(found))):
            raise ArtifactError(
                f"{self.file}: {self.slot.name} holds {count} numbers that are not finite: fetch it again"
            )
        return rounded(found, DTYPES[self.slot.dtype][0])

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """All values in the order of the float tensor, in blocks; each with the number of its first value. Raises as `rows`.

        A block has some rows of a matrix, or one whole matrix where the float tensor has its inputs first.
        """
        outputs, n = self.matrix
        step = outputs if self.transposed else max(ROWS // n, 1)
        for matrix in range(prod(self.slot.shape[:-2])):  # 1 of a vector or a matrix
            for begin in range(0, outputs, step):
                found = self.rows(slice(begin, min(begin + step, outputs)), matrix)
                yield matrix * outputs * n + begin * n, found.T if self.transposed else found

    def mapped(self) -> NDArray[Any]:
        """All values, decoded into memory. Raises as `rows`."""
        out = np.empty(prod(self.slot.shape), np.dtype(DTYPES[self.slot.dtype][0]))
        for first, block in self.blocks():
            out[first : first + block.size] = block.reshape(-1)
        return out.reshape(self.slot.shape)

    def read(self) -> NDArray[Any]:
        """The same as `mapped`."""
        return self.mapped()


def rounded(found: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Float32 numbers in `dtype`, rounded once."""
    import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16

    with np.errstate(over="ignore", invalid="ignore"):
        return found.astype(np.dtype(dtype))


def parts_of(stored: Stored) -> list[Stored]:
    """The stored tensors behind `stored`: itself, or the parts of an encoded one."""
    return list(stored.parts.values()) if isinstance(stored, Encoded) else [stored]
