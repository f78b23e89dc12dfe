"""Integers of compressed-tensors' pack-quantized, as mapped, in other layouts: one pass over memory, with no array in between.

The layouts' own `store` defines the bytes; tests compare. Weights that are not the plain case here take that way.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.formats import gguf, mlx_lm
from qkit.formats.packed import Tensors
from qkit.grid import Grid
from qkit.qtensor import DType
from qkit.reference import packing

PLAIN = ("weight_packed", "weight_scale", "weight_shape")
BYTES = 1 << 21  #: of blocks that are computed together: they stay in the processor's cache until they are written
KINDS = {4: "Q4_0", 8: "Q8_0"}  #: GGUF's types whose codes are those of an integer of so many bits
_own = threading.local()


@dataclass(frozen=True, slots=True)
class Mapped:
    """Symmetric integers: packed words, and a scale in bfloat16 for each group, all of them sound (R3).

    Attributes:
        words: uint32 [outputs, words].
        scales: bfloat16 [outputs, groups].
        grid: of the weight.
        dtype: type of the weight before it was quantized.
        shape: of the weight, [outputs, inputs].
        least, most: the least and the largest scale.
    """

    words: NDArray[np.uint32]
    scales: NDArray[np.generic]
    grid: Grid
    dtype: DType
    shape: tuple[int, ...]
    least: float
    most: float


def mapped(parts: Tensors | None, *, grid: Grid, dtype: DType, shape: tuple[int, ...]) -> Mapped | None:
    """The weight of `shape` in `parts`; None where it is no such weight, or is not sound.

    Args:
        parts: stored tensors by compressed-tensors' names, as mapped.
    """
    plain = grid.element.kind == "integer" and grid.symmetric and not grid.read and grid.group != "tensor"
    if parts is None or not plain or not native.available() or parts.keys() != set(PLAIN):
        return None
    words, scales, says = (parts[name] for name in PLAIN)
    expected = (shape[0], packing.words(shape[1], grid.element.bits)), grid.scale_shape(shape)
    types = words.dtype.name, scales.dtype.name
    sound = types == ("int32", "bfloat16") and (words.shape, scales.shape) == expected and tuple(says.tolist()) == shape
    if not (sound and words.flags.c_contiguous and scales.flags.c_contiguous):
        return None
    least, most = native.span(scales)
    if not 0 < least <= most < float("inf"):
        return None
    return Mapped(words.view(np.uint32), scales, grid, dtype, shape, least, most)


def mlx_tensors(weight: Mapped) -> Tensors | None:
    """The tensors of `mlx_lm.store`; its scales are those of `weight` themselves where MLX has the same. None as in `mapped`."""
    inputs, bits = weight.shape[1], weight.grid.element.bits
    container = mlx_lm.container_for(weight.grid, inputs)
    if container is None or inputs % container.group:
        return None
    kind = mlx_lm.contents(weight.grid, dtype=weight.dtype, shape=weight.shape)["biases"][0]
    repeat = inputs // container.group // weight.scales.shape[1]
    same = repeat == 1 and kind == "bfloat16"
    scales = weight.scales if same else native.repeated(weight.scales, repeat=repeat, factor=1.0, kind=kind)
    biases = native.repeated(weight.scales, repeat=repeat, factor=-float(1 << (bits - 1)), kind=kind)
    return {"weight": weight.words, "scales": scales, "biases": biases}


def gguf_kind(weight: Mapped) -> str | None:
    """GGUF's type of blocks that have the codes of `weight` in other places; None where codes or scales are computed anew."""
    kind = KINDS.get(weight.grid.element.bits)
    low, high = gguf.EXACT
    fits = low <= weight.least and weight.most <= high and (weight.shape[1] // weight.scales.shape[1]) % gguf.BLOCK == 0
    return kind if fits else None


def gguf_blocks(weight: Mapped, order: NDArray[np.int64] | None) -> Iterator[NDArray[np.uint8]]:
    """The rows of blocks of `gguf.store` in a new `order`, some rows at a time, each in the memory of the one before."""
    bits, (rows, inputs) = weight.grid.element.bits, weight.shape
    length = inputs // gguf.BLOCK * (4 * bits + 2)
    step = max(BYTES // length, 1)
    memory = _memory(min(step, rows) * length).reshape(-1, length)
    repeat = inputs // gguf.BLOCK // weight.scales.shape[1]
    for start in range(0, rows, step):
        some = slice(start, start + step) if order is None else order[start : start + step]
        words, scales = weight.words[some], weight.scales[some]
        out = memory[: len(words)]
        native.scaled_blocks(words, scales, repeat=repeat, bits=bits, out=out)
        yield out


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """Memory of this thread, for one weight at a time: the system clears new memory, which costs more than the work on it."""
    if getattr(_own, "memory", np.empty(0)).nbytes < nbytes:
        _own.memory = np.empty(nbytes, np.uint8)
    found: NDArray[np.uint8] = _own.memory[:nbytes]
    return found
