"""No layout at all: a quantized weight as the plain tensor of its values, which any reader opens."""

from typing import Any

from numpy.typing import NDArray

from qkit import reference
from qkit.formats.packed import Tensors, unpack
from qkit.grid import Grid
from qkit.qtensor import DType
from qkit.reference.packing import Packed


def store(packed: Packed) -> Tensors:
    """The values of `packed`, in the type of what was quantized. There is no way back."""
    values: NDArray[Any] = reference.dequantize(unpack(packed))
    return {"weight": values}


def contents(grid: Grid, *, dtype: DType, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every tensor that `store` gives."""
    return {"weight": (dtype, shape)}
