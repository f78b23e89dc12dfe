"""MLX's files: the form of every quantized weight, in all modes of `mx.quantize`.

Read off MLX 0.32 (`ops.cpp`, `nn.QuantizedLinear`) and mlx-lm 0.32 (`utils.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qkit.errors import ArtifactError
from qkit.formats import mlx_config
from qkit.formats.mlx_types import SAME_NAMES
from qkit.formats.packed import Tensors as Arrays
from qkit.formats.packed import join
from qkit.qtensor import DType
from qkit.reference import packing
from qkit.sources.encoded import Encoded
from qkit.sources.integers import Grouped
from qkit.sources.law import Codes
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, take, want_type

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


def mlx(
    tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None, *, config: Mapping[str, Any]
) -> dict[str, Encoded]:
    """The weights in MLX's layout, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: mlx-lm renames the tensors of such a model or stacks them, or see `mlx_config.containers`.
    """
    kind = config.get("model_type")
    if kind not in SAME_NAMES:
        known = ", ".join(sorted(SAME_NAMES))
        raise ArtifactError(
            f"how mlx-lm renames the tensors of a {kind!r} is not known to this qkit: known are {known}"
        )
    shapes = {
        path: (tensors[f"{path}.weight"].slot.shape, tensors[f"{path}.scales"].slot.shape)
        for path in sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
        if f"{path}.weight" in tensors
    }
    found = {}
    for path, (container, shape) in mlx_config.containers(settings, shapes).items():
        if len(shape) != 2:
            raise ArtifactError(
                f"{path} stacks experts: qkit import DIR OUT makes an artifact of it, with the same codes"
            )
        parts = take(tensors, path, PARTS)
        form = Mlx(container.mode, container.bits, container.group)
        scale = check_part(parts, "scales", FLOATS if form.mode == "affine" else ("uint8",))
        if form.mode == "affine":
            check_part(parts, "biases", FLOATS, scale.slot.shape)
        check_part(parts, "weight", ("uint32",))
        name = join(path, "weight")
        found[name] = encoded(name, shape, dtype=want_type(scale, dtype), form=form, parts=parts, codes="weight")
    return found
