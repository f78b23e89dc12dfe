"""The dense layout: a quantized weight as the plain tensor of its dequantized values, which any reader opens."""

from typing import Any

from numpy.typing import NDArray

from qkit import reference
from qkit.formats.packed import Tensors, unpack
from qkit.grid import Grid
from qkit.qtensor import DType
from qkit.reference.packing import Packed


def store(packed: Packed) -> Tensors:
    """The dequantized values of `packed`, in the type of the weight before quantization. The codes cannot be recovered."""
    values: NDArray[Any] = reference.dequantize(unpack(packed))
    return {"weight": values}


def contents(grid: Grid, *, dtype: DType, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every tensor that `store` returns."""
    return {"weight": (dtype, shape)}
