"""The form of one weight in MLX's files, in all modes of `mx.quantize`.

Read off MLX 0.32 (`ops.cpp`, `nn.QuantizedLinear`).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from qkit.formats.packed import Tensors as Arrays
from qkit.reference import packing
from qkit.sources.integers import Grouped
from qkit.sources.law import Codes
from qkit.sources.parts import FLOATS, Tensors, check_part
from qkit.storage.read import Stored

PARTS: Final = ("weight", "scales", "biases")
ELEMENTS: Final = {"mxfp4": "e2m1", "nvfp4": "e2m1", "mxfp8": "e4m3"}


@dataclass(frozen=True, slots=True)
class Mlx(Grouped):
    """MLX's words: a stream of bits for each row, with scales, and in mode `affine` with float biases.

    Attributes:
        mode: `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
        bits: of a code.
        group: codes that share a scale.
    """

    mode: str
    bits: int
    group: int

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"MLX {self.mode}, {self.bits} bits, groups of {self.group}"

    def codes(self, parts: Arrays, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        import ml_dtypes  # here, so that `import qkit` stays cheap

        words, scales = parts["weight"][rows], parts["scales"][rows]
        found = packing.unpack(np.ascontiguousarray(words), self.bits, scales.shape[-1] * self.group)
        if self.mode == "affine":
            return Codes(f"int{self.bits}", found, scales, (1, self.group), offsets=parts["biases"][rows])
        scales = scales.view(ml_dtypes.float8_e4m3fn) if self.mode == "nvfp4" else scales
        return Codes(ELEMENTS[self.mode], found, scales, (1, self.group))

    def check(self, parts: Tensors) -> Stored:
        """The scales among `parts`, after a comparison of types and shapes.

        Raises:
            ArtifactError: a part is missing, or is not that of this form.
        """
        affine = self.mode == "affine"
        scale = check_part(parts, "scales", FLOATS if affine else ("uint8",))
        if affine:
            check_part(parts, "biases", FLOATS, scale.slot.shape)
        check_part(parts, "weight", ("uint32",))
        return scale
