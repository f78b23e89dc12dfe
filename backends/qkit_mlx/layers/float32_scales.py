"""Modules whose scales stay float32 when the model around them is cast."""

from typing import Any

import mlx.core as mx

from qkit.errors import StageError
from qkit.qtensor import DTYPES, DType
from qkit.reference import learned
from qkit_mlx.arithmetic import rounding
from qkit_mlx.layers.shown import Shown

RANGES = ("input_range", "output_range")
#: The arrays that no cast may round (R11).
UNCAST = ("scales", "biases", "tensor_scale", "input_scale", "output_scale", *RANGES, *learned.NAMES, *learned.FIRSTS)
TYPES: dict[Any, DType] = {rounding.DTYPE[name]: name for name in DTYPES}


def _is_read(module: Any) -> bool:
    grid = getattr(module, "grid", None)
    return grid is not None and grid.read


class Float32Scales(Shown):
    """A module that keeps its scales in float32, or in the type of their file. A cast of the model changes its `dtype` instead.

    `set_dtype`, `apply` and `update` of a model write into its modules as into dicts. `__setitem__` therefore sees all casts.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        current = self.get(name)
        if name in UNCAST and current is not None and value.dtype == mx.float32 != current.dtype and _is_read(self):
            self.change_dtype("float32")  # a cast: scales of a file keep their type
        elif name not in UNCAST or current is None or value.dtype in (current.dtype, mx.float32):
            super().__setitem__(name, value)
        elif value.dtype in TYPES and mx.array_equal(current.astype(value.dtype), value):
            self.change_dtype(TYPES[value.dtype])
        else:
            raise StageError(
                f"{name} of a {type(self).__name__} are {current.dtype}, and {value.dtype} ones were put in their "
                "place: give arrays of their own type"
            )

    def widened(self, name: str) -> Any:
        """The array `name` in float32, if it is there in 16 bits: exactly. None where it is not there."""
        array = self.get(name)
        return array.astype(mx.float32) if array is not None and array.dtype in (mx.bfloat16, mx.float16) else array

    def stored(self, name: str) -> Any:
        """The array `name` as a `QTensor` has it: as the file, on a read grid, else widened."""
        return self.get(name) if _is_read(self) else self.widened(name)

    def change_dtype(self, dtype: DType) -> None:
        """Has the module round its values to `dtype`, the type that the model was cast to."""
        self.dtype = dtype
