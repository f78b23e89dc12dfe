"""A weight behind factors of its layer's inputs: x * factor, then the quantized weight, is one weight for x itself."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit.formats.packed import Tensors
from qkit.sources.encoded import Form
from qkit.sources.law import values


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Values of codes, times the factor of each input: fl(value * factor), in float32. No grid holds them.

    Attributes:
        form: of the codes.
        factors: name of the tensor with the factors [inputs] in files; the part is called `smooth`.
    """

    form: Form
    factors: str

    @property
    def name(self) -> str:
        """See `Valued`."""
        return f"{self.form.name}, times {self.factors}"

    def values(self, parts: Tensors, rows: slice) -> NDArray[np.float32]:
        """The values of some rows [rows, inputs], float32."""
        found: NDArray[np.float32] = values(self.form.codes(parts, rows, 0))
        return found * parts["smooth"].reshape(-1).astype(np.float32)
