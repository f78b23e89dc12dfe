"""A quantized tensor as an array of its float values, which are computed when they are used, some rows at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.sources.encoded import Encoded
from qkit.storage.layout import DTYPES


class DecodedArray:
    """Behaves as the read-only array of the values of `encoded`, for code that takes `shape`, `dtype`, rows or a whole array.

    Attributes:
        encoded: the tensor.
        shape, dtype, ndim, size, nbytes: as those of a NumPy array.
    """

    def __init__(self, encoded: Encoded) -> None:
        import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16

        self.encoded = encoded
        self.shape = encoded.slot.shape
        self.dtype = np.dtype(DTYPES[encoded.slot.dtype][0])
        self.ndim, self.nbytes = len(self.shape), encoded.slot.nbytes
        self.size = self.nbytes // self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        found = self.encoded.mapped()
        return found if dtype is None else found.astype(dtype)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Some rows of a matrix, decoded alone; any other part by way of the whole."""
        if isinstance(key, slice) and self.ndim == 2 and not self.encoded.transposed:
            return self.encoded.rows(key)
        found: NDArray[Any] = self.encoded.mapped()[key]
        return found

    def astype(self, dtype: Any) -> NDArray[Any]:
        """The values in another type."""
        return self.encoded.mapped().astype(dtype)

    def reshape(self, *shape: Any) -> NDArray[Any]:
        """The values in another shape."""
        return self.encoded.mapped().reshape(*shape)

    def tobytes(self) -> bytes:
        """The bytes of the values."""
        return self.encoded.mapped().tobytes()
