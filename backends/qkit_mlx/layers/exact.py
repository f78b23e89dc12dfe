"""A module that keeps its scales in float32 when the model around it is cast."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit.errors import StageError
from qkit.qtensor import DTYPES, DType
from qkit.reference import learned
from qkit_mlx.arithmetic import rounding

RANGES = ("input_range", "output_range")
#: What no cast may round (R11).
EXACT = ("scales", "biases", "tensor_scale", "input_scale", "output_scale", *RANGES, *learned.NAMES)
TYPES: dict[Any, DType] = {rounding.DTYPE[name]: name for name in DTYPES}


class Exact(nn.Module):
    """A module whose scales stay as they are when the model around it is cast; the cast changes `dtype` instead.

    `Module.set_dtype`, `apply` and `update` of a model write into the modules below it as into dicts, so that this is
    the one place that all of them pass.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        held = self.get(name)
        if name not in EXACT or held is None or value.dtype in (held.dtype, mx.float32):
            super().__setitem__(name, value)
        elif value.dtype in TYPES and mx.array_equal(held.astype(value.dtype), value):
            self.retype(TYPES[value.dtype])
        else:
            raise StageError(
                f"{name} of a {type(self).__name__} are {held.dtype}, and {value.dtype} ones were put in their place"
            )

    def retype(self, dtype: DType) -> None:
        """What a cast of the model changes: the type that values are rounded to."""
        self.dtype = dtype
