"""Weights in GGUF's blocks: those with one scale and perhaps an offset as codes, all others as their values.

Read off gguf 0.19 (`quants.py`). `gguf_file` opens the files.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.formats.packed import Tensors
from qkit.sources.law import Codes

BLOCK: Final = 32
NV_BLOCK: Final = 16
#: Types whose blocks are codes with one scale: bytes of a block before its codes, bits of a code, and its lowest value.
SCALED: Final = {"Q4_0": (2, 4, -8), "Q5_0": (2, 5, -16), "Q8_0": (2, 8, 0), "Q4_1": (4, 4, 0), "Q5_1": (4, 5, 0)}
HELD: Final = (*SCALED, "MXFP4", "NVFP4")
SUPER: Final = 36  #: bytes of 64 numbers in NVFP4


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """Codes in blocks of a type of `HELD`.

    Attributes:
        kind: GGUF's type.
        heads: heads of a matrix of queries or keys whose rows lie in the order of complex pairs; 0 for any other.
        scaled: whether a tensor beside it has a scale for all.
    """

    kind: str
    heads: int = 0
    scaled: bool = False

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"GGUF {self.kind}"

    @property
    def block(self) -> tuple[int, int]:
        """See `Form`."""
        return 1, NV_BLOCK if self.kind == "NVFP4" else BLOCK

    @property
    def scales_in(self) -> str:
        """See `Form`."""
        return "blocks"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        import ml_dtypes  # here, so that `import qkit` stays cheap

        raw = taken(parts["blocks"], rows, self.heads)
        if self.kind == "NVFP4":
            blocks = raw.reshape(len(raw), -1, SUPER)
            scales = np.where(blocks[..., :4] == 0x7F, np.uint8(0), blocks[..., :4]).reshape(len(raw), -1)
            factor = parts["factor"].reshape(-1)[0] if self.scaled else np.float32(1)
            e4m3 = scales.view(ml_dtypes.float8_e4m3fn)
            return Codes("e2m1", _halves(blocks[..., 4:], 8), e4m3, self.block, tensor_scale=factor)
        if self.kind == "MXFP4":
            blocks = raw.reshape(len(raw), -1, 17)
            return Codes("e2m1", _halves(blocks[..., 1:], 16), np.ascontiguousarray(blocks[..., 0]), self.block)
        head, bits, lowest = SCALED[self.kind]
        size = head + BLOCK * bits // 8
        blocks = raw.reshape(len(raw), -1, size)
        floats = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
        scales = np.ascontiguousarray(floats[..., 0])
        if bits == 8:
            return Codes(
                "int8", np.ascontiguousarray(blocks[..., 2:]).reshape(len(raw), -1).view(np.int8), scales, self.block
            )
        found = _halves(blocks[..., head + (4 if bits == 5 else 0) :], 16)
        if bits == 5:
            high = np.unpackbits(blocks[..., head : head + 4], axis=-1, bitorder="little").reshape(len(raw), -1)
            found = found | (high << np.uint8(4))
        if lowest:
            return Codes(f"int{bits}", found.astype(np.int8) + np.int8(lowest), scales, self.block)
        return Codes(f"int{bits}", found, scales, self.block, offsets=np.ascontiguousarray(floats[..., 1]))


@dataclass(frozen=True, slots=True)
class GgufValues:
    """Values of any type of GGUF, which the gguf package decodes: several scales in a block, tables, or floats.

    Attributes:
        kind, heads: as in `GgufBlocks`.
        shift: number that is added to each value: -1 where the file has 1 + w of a norm.
    """

    kind: str
    heads: int = 0
    shift: float = 0.0

    @property
    def name(self) -> str:
        """See `Valued`."""
        return f"GGUF {self.kind}"

    def values(self, parts: Tensors, rows: slice) -> NDArray[np.float32]:
        """The values of some rows, float32."""
        import gguf  # here, since no other file needs it

        raw = taken(parts["blocks"], rows, self.heads)
        found: NDArray[Any] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])
        return (found.astype(np.float32) + np.float32(self.shift)).reshape(len(raw), -1)


def taken(raw: NDArray[Any], rows: slice, heads: int) -> NDArray[np.uint8]:
    """Some rows of blocks, in the order of transformers: of each head, llama.cpp has the rows of both halves in turn."""
    if not heads:
        return np.ascontiguousarray(raw[rows])
    count = len(raw)
    theirs = np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return np.ascontiguousarray(raw[theirs[rows]])


def _halves(pairs: NDArray[np.uint8], half: int) -> NDArray[np.uint8]:
    """Codes of 4 bits: of each run of `half` bytes, the low bits first, then the high bits."""
    runs = pairs.reshape(len(pairs), -1, half)
    both = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=-1)
    return both.reshape(len(pairs), -1)
