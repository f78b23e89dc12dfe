"""GGUF's layout of one weight, which llama.cpp and transformers open: blocks of 32 codes, each with its scale.

Read off gguf 0.19 (`quants.py`). Codes change places within their block. Scales become float16, where that is exact.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.mlx_lm import spread
from qkit.formats.packed import unpack
from qkit.grid import Grid
from qkit.reference import packing
from qkit.reference.packing import Packed

BLOCK: Final = 32
TYPES: Final = {"int4": "Q4_0", "int8": "Q8_0", "e2m1": "MXFP4"}  #: the types of GGUF that qkit writes, by element


def layout(grid: Grid, inputs: int) -> str:
    """The GGUF type for rows of `inputs` numbers on `grid`. Groups longer than a block repeat their scale.

    Raises:
        ArtifactError: GGUF has no such type.
    """
    group = grid.group if isinstance(grid.group, int) else inputs
    if grid.element.name not in TYPES or not grid.symmetric or grid.scale == "nvfp4" or group % BLOCK:
        raise ArtifactError(
            f"GGUF holds no rows of {inputs} on {grid}: it holds int4 and int8 without zero points, and e2m1 under E8M0 scales, "
            f"in groups that {BLOCK} divides; export --to dense"
        )
    return TYPES[grid.element.name]


def store(packed: Packed) -> NDArray[np.uint8]:
    """`packed` as rows of blocks, uint8 [outputs, bytes]. A block is its scale, then its codes; a 4-bit byte has two of them.

    Raises:
        ArtifactError: GGUF has no type for the grid, or a scale is no float16.
    """
    rows, inputs = packed.shape
    kind = layout(packed.grid, inputs)
    scales = packed.scales
    if kind != "MXFP4":
        with np.errstate(over="ignore"):
            scales = packed.scales.astype(np.float16)
        lost = int(np.count_nonzero(scales.astype(np.float32) != packed.scales))
        if lost:
            raise ArtifactError(f"{lost} of {scales.size} scales are no float16, which {kind} holds: export --to dense")
    head = np.ascontiguousarray(spread(scales, rows, inputs // BLOCK))[..., None].view(np.uint8)
    codes = unpack(packed).codes.reshape(rows, -1, BLOCK)
    body: NDArray[Any] = codes.view(np.uint8)
    if kind != "Q8_0":
        nibbles = codes if kind == "MXFP4" else packing.unsigned(codes, packed.grid.element)
        body = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    return np.concatenate([head, body], axis=-1).reshape(rows, -1)
