"""GGUF's layout of one weight, which llama.cpp and transformers open: blocks of codes, each with its scale.

Read off gguf 0.19 (`quants.py`) and llama.cpp 0.5 (`ggml-common.h`). Codes change places within their block, and narrow codes
move into wider ones. Scales become float16, where that is exact. No value changes.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.errors import ArtifactError
from qkit.formats.mlx_lm import spread
from qkit.formats.packed import unpack
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.packing import Packed

BLOCK: Final = 32
SUPER_BLOCK: Final = 64  #: numbers of an NVFP4 block, which has four scales
#: The smallest type of GGUF that holds the codes of an element.
TYPES: Final = {
    **dict.fromkeys(("int2", "int3", "int4"), "Q4_0"),
    "int5": "Q5_0",
    "int6": "Q8_0",
    "int8": "Q8_0",
    "e2m1": "MXFP4",
}
#: The smallest type that holds codes less their zero point, which have one bit more.
SHIFTED: Final = {"int2": "Q4_0", "int3": "Q4_0", "int4": "Q5_0", "int5": "Q8_0", "int6": "Q8_0"}
LOWEST: Final = {"Q4_0": -8, "Q5_0": -16}  #: the integer that these types store as 0
OFFSETS: Final = {4: "Q4_1", 5: "Q5_1"}  #: the types with a scale and an offset, by the bits of a code
#: Bytes of 64 numbers of each type.
SIZES: Final = {
    "Q4_0": 36,
    "Q4_1": 40,
    "Q5_0": 44,
    "Q5_1": 48,
    "Q8_0": 68,
    "MXFP4": 34,
    "NVFP4": 36,
    "F16": 128,
    "BF16": 128,
    "F32": 256,
}
FLOATS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  #: GGUF's types of floats, by NumPy's
EXACT: Final = 2.0**-17, 65280.0  #: numbers of 8 significant bits between these are float16
NUMBERS: Final = 1 << 20  #: numbers of a weight that are unpacked together
WAY_OUT: Final = "export --to dense, or --fallback f16 for its values as float16"


def layout(grid: Grid, inputs: int) -> str:
    """The smallest GGUF type that holds every tensor with rows of `inputs` numbers on `grid`, value by value.

    Groups longer than a block repeat their scale.

    Raises:
        ArtifactError: GGUF has no such type.
    """
    group = grid.group if isinstance(grid.group, int) else inputs
    kind = _kind_of_read(grid) if grid.read else (TYPES if grid.symmetric else SHIFTED).get(grid.element.name)
    if grid.scale == "nvfp4":
        kind, fits = "NVFP4", inputs % SUPER_BLOCK == 0
    else:
        fits = group % BLOCK == 0 and inputs % BLOCK == 0
    if kind is None or not fits:
        raise ArtifactError(
            f"GGUF holds no rows of {inputs} on {grid}: it holds {', '.join(TYPES)}, of which {', '.join(SHIFTED)} with zero "
            f"points, in groups and rows that {BLOCK} divides, and nvfp4 in rows that {SUPER_BLOCK} divides; {WAY_OUT}"
        )
    return kind


def _kind_of_read(grid: Grid) -> str | None:
    """The type for a read grid: blocks have a scale and an offset in float16, a scale in float16, or an E8M0 code."""
    if grid.has_biases:
        return OFFSETS.get(grid.element.bits)
    if grid.element.kind == "integer":
        return (SHIFTED if grid.has_zeros else TYPES).get(grid.element.name)
    return "MXFP4" if (grid.element.name, grid.scale) == ("e2m1", "stored-e8m0") else None


def kind_of(packed: Packed) -> str:
    """The smallest GGUF type that holds `packed`: that of `layout`, or a type with offsets where all of them are float16.

    Reads scales and zero points, and only where a scale is no float16 the codes too.

    Raises:
        ArtifactError: GGUF has no type for the grid, or scales are no float16.
    """
    kind = layout(packed.grid, packed.shape[-1])
    if kind in ("MXFP4", "NVFP4"):
        return kind
    if packed.biases is not None:
        return _with_offsets(packed, kind)
    if packed.zeros is not None and (packed.zeros > packed.grid.element.levels).any():
        raise ArtifactError(f"a zero point is above {packed.grid.element.levels}: {WAY_OUT}")
    lost = sum(int(np.count_nonzero(_lost(block))) for block in packed.blocks(NUMBERS)) if _inexact(packed).any() else 0
    if lost:
        raise ArtifactError(f"{lost} of {packed.scales.size} scales are no float16, which {kind} holds: {WAY_OUT}")
    if packed.zeros is not None and packed.grid.element.bits in OFFSETS:
        exact = _offsets(packed)
        if not _inexact(packed).any() and (_half(exact) == exact).all():
            return OFFSETS[packed.grid.element.bits]
    return kind


def store(packed: Packed, kind: str | None = None, *, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """`packed` as rows of blocks of the type `kind`, uint8 [outputs, bytes]: in each, its scales come before its codes.

    Args:
        kind: that of the whole tensor, where `packed` is a part of it; left out: that of `packed`.
        out: memory that the rows may be in, for as many bytes as they have: new memory costs more than the work on a block.

    Raises:
        ArtifactError: see `kind_of`.
    """
    kind = kind or kind_of(packed)
    rows = packed.shape[0]
    if native.available() and (flip := _moved(packed, kind)) is not None:
        bits, run = packed.grid.element.bits, 16 if kind == "NVFP4" else BLOCK
        heads = _heads(packed, kind)
        return native.interleave(packed.words, heads, bits=bits, run=run, flip=flip, out=out).reshape(rows, -1)
    q, heads = unpack(packed), _heads(packed, kind)
    if kind == "NVFP4":
        body = [_nibbles(q.codes, 16).reshape(rows, -1, 32)]
    elif kind == "MXFP4":
        body = [_nibbles(q.codes, BLOCK)]
    elif kind in OFFSETS.values():
        body = _bits(q.codes, kind)
    elif kind == "Q8_0":
        body = [_steps(q).astype(np.int8).reshape(rows, -1, BLOCK).view(np.uint8)]
    else:
        body = _bits((_steps(q) - LOWEST[kind]).astype(np.uint8), kind)
    return np.concatenate([heads, *body], axis=-1).reshape(rows, -1)


def _moved(packed: Packed, kind: str) -> int | None:
    """The number that bytes of codes are XORed with where codes only change places; None where they are computed anew."""
    bits = packed.grid.element.bits
    if kind in ("NVFP4", "MXFP4", OFFSETS[4]) or (kind == "Q4_0" and bits == 4 and packed.zeros is None):
        return 0
    return 0x80 if kind == "Q8_0" and bits == 8 and packed.zeros is None else None


def _heads(packed: Packed, kind: str) -> NDArray[np.uint8]:
    """The bytes of the scales and offsets of each block, [rows, blocks, bytes]."""
    rows, inputs = packed.shape
    if kind == "NVFP4":
        return np.ascontiguousarray(packed.scales).view(np.uint8).reshape(rows, inputs // SUPER_BLOCK, 4)
    if kind == "MXFP4":
        return _head(packed.scales, rows, inputs)
    if kind in OFFSETS.values():
        offsets = _offsets(packed)
        return np.concatenate([_head(_half(part), rows, inputs) for part in (packed.scales, offsets)], axis=-1)
    inexact = _inexact(packed)
    scales = np.where(_lost_or_idle(packed), np.float32(0), packed.scales) if inexact.any() else packed.scales
    if native.available() and len(scales) == rows:
        halves = native.halves(scales.astype(np.float32, copy=False), repeat=inputs // BLOCK // scales.shape[1])
        return halves[..., None].view(np.uint8)
    return _head(_half(scales), rows, inputs)


def _half(numbers: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16)


def _offsets(packed: Packed) -> NDArray[np.float32]:
    """The value of code 0: a bias, or exactly minus zero point times scale, which together have 24 significant bits or fewer."""
    if packed.biases is not None:
        return packed.biases.astype(np.float32)
    assert packed.zeros is not None
    return -(packed.scales.astype(np.float32) * packed.zeros.astype(np.float32))


def _with_offsets(packed: Packed, kind: str) -> str:
    """`kind`, if each scale and each bias of `packed` is a float16."""
    for name, numbers in (("scales", packed.scales), ("biases", packed.biases)):
        assert numbers is not None
        exact = numbers.astype(np.float32)
        lost = np.count_nonzero(_half(exact) != exact)
        if lost:
            raise ArtifactError(f"{lost} of {numbers.size} {name} are no float16, which {kind} holds: {WAY_OUT}")
    return kind


def _inexact(packed: Packed) -> NDArray[np.bool_]:
    """Where a scale is no float16. Scales have 8 significant bits (R3), so that most are one by their range alone."""
    magnitudes = np.abs(packed.scales.astype(np.float32))
    if not packed.grid.read and magnitudes.min() >= EXACT[0] and magnitudes.max() <= EXACT[1]:
        return np.zeros(magnitudes.shape, np.bool_)
    exact = packed.scales.astype(np.float32)
    return np.asarray(_half(exact).astype(np.float32) != exact)


def _steps(q: QTensor[NDArray[Any]]) -> NDArray[np.int16]:
    """The integers that scales multiply: codes, less their zero point where there is one."""
    codes: NDArray[np.int16] = q.codes.astype(np.int16)
    return codes if q.zeros is None else codes - spread(q.zeros, *codes.shape)


def _lost(packed: Packed) -> NDArray[np.bool_]:
    """Where a scale is no float16 and its group is not all zeros. A scale of zeros may be any number."""
    inexact = _inexact(packed)
    if not inexact.any():
        return inexact
    steps = _steps(unpack(packed)) != 0
    used = steps.reshape(len(steps), packed.scales.shape[1], -1).any(axis=-1)
    lost: NDArray[np.bool_] = inexact & (used.any(keepdims=True) if packed.scales.shape[0] != len(steps) else used)
    return lost


def _lost_or_idle(packed: Packed) -> NDArray[np.bool_]:
    """Where a group is all zeros and its scale is no float16.

    Raises:
        ArtifactError: a group that is not all zeros has such a scale.
    """
    lost = int(np.count_nonzero(_lost(packed)))
    if lost:
        raise ArtifactError(f"{lost} of {packed.scales.size} scales are no float16: {WAY_OUT}")
    return _inexact(packed)


def _head(per_group: NDArray[Any], rows: int, inputs: int) -> NDArray[np.uint8]:
    """The bytes of scales or offsets, once for each block."""
    return np.ascontiguousarray(spread(per_group, rows, inputs // BLOCK))[..., None].view(np.uint8)


def _bits(codes: NDArray[np.uint8], kind: str) -> list[NDArray[np.uint8]]:
    """Unsigned codes of 4 or 5 bits: for 5, the highest bits of a block, then its nibbles."""
    low = _nibbles(codes & np.uint8(15), BLOCK)
    if not kind.startswith("Q5"):
        return [low]
    high = (codes >> 4).reshape(len(codes), -1, BLOCK)
    return [np.packbits(high, axis=-1, bitorder="little"), low]


def _nibbles(codes: NDArray[np.uint8], run: int) -> NDArray[np.uint8]:
    """Codes of 4 bits, two in a byte: the first half of each run of codes in the low bits, the second in the high bits."""
    runs = codes.reshape(len(codes), -1, run)
    joined: NDArray[np.uint8] = np.bitwise_or(runs[..., : run // 2], runs[..., run // 2 :] << np.uint8(4))
    return joined
