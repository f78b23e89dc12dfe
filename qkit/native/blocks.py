"""Blocks of codes, each after its scales, as GGUF stores them. One thread: the callers work on several weights at one time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.native.library import TYPES, function


def halves(scales: NDArray[np.float32], *, repeat: int) -> NDArray[np.float16]:
    """Each of `scales` [rows, n], none of them NaN, as the nearest float16, `repeat` times: [rows, n * repeat].

    Raises:
        BackendError: the library was not built.
    """
    scales = np.ascontiguousarray(scales)
    out = np.empty((scales.shape[0], scales.shape[1] * repeat), np.float16)
    function("qkit_halves")(scales.ctypes.data, scales.size, repeat, out.ctypes.data)
    return out


def interleave(
    words: NDArray[np.uint32],
    heads: NDArray[np.uint8],
    *,
    bits: int,
    run: int,
    flip: int = 0,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Packed codes of 4 or 8 bits and the bytes of scales, in one row of blocks, each of which begins with its scales.

    In each run of 4-bit codes, byte i holds code i in its low half and code i + run / 2 in its high half.

    Args:
        words: whole rows of codes without padding.
        heads: [rows, blocks, bytes of a block's scales].
        run: codes of a run; runs fill blocks.
        flip: number that each byte of 8-bit codes is XORed with.
        out: contiguous, at least as long as the result, which begins there; None makes an array.

    Raises:
        ValueError: `out` does not fit.
        BackendError: the library was not built.
    """
    words, heads = np.ascontiguousarray(words), np.ascontiguousarray(heads)
    blocks, head = heads.size // heads.shape[-1], heads.shape[-1]
    codes = words.nbytes * 8 // bits // blocks
    length = heads.nbytes + words.nbytes
    out = np.empty(length, np.uint8) if out is None else out[:length]
    if out.nbytes < length or not out.flags.c_contiguous:
        raise ValueError(f"out has {out.nbytes} bytes: {length} contiguous ones are to be written")
    sizes = blocks, head, codes // run, run
    function("qkit_interleave")(words.ctypes.data, heads.ctypes.data, *sizes, bits, flip, out.ctypes.data)
    return out


def scaled_blocks(
    words: NDArray[np.uint32], scales: NDArray[Any], *, repeat: int, bits: int, out: NDArray[np.uint8]
) -> None:
    """Packed integers of 4 or 8 bits and their scales as blocks of GGUF's Q4_0 or Q8_0, in one pass over memory.

    Args:
        words: contiguous whole rows of codes without padding.
        scales: contiguous bfloat16 of the groups of these rows, each a float16 too.
        repeat: blocks of 32 codes in a group.
        out: contiguous, as long as all blocks.

    Raises:
        ValueError: a size does not fit the others.
        BackendError: the library was not built.
    """
    count = scales.size * repeat
    if words.nbytes != count * 4 * bits or out.nbytes != count * (4 * bits + 2):
        raise ValueError(f"{count} blocks of {bits} bits: not {words.nbytes} bytes of codes in {out.nbytes}")
    function("qkit_blocks")(words.ctypes.data, scales.ctypes.data, scales.size, repeat, bits, out.ctypes.data)


def span(scales: NDArray[Any]) -> tuple[float, float]:
    """The least and the largest magnitude of contiguous `scales` in bfloat16; NaN as the largest where one is NaN.

    Raises:
        BackendError: the library was not built.
    """
    found = np.empty(2, np.uint16)
    function("qkit_spans")(scales.ctypes.data, scales.size, found.ctypes.data, found.ctypes.data + 2)
    least, most = (found.astype(np.uint32) << 16).view(np.float32)
    return float(least), float(most)


def repeated(scales: NDArray[Any], *, repeat: int, factor: float, kind: str) -> NDArray[Any]:
    """Contiguous `scales` [rows, n] in bfloat16 times `factor`, each `repeat` times, as `kind`: [rows, n * repeat].

    Args:
        factor: a power of two, with its sign, so that the products are exact.

    Raises:
        BackendError: the library was not built.
    """
    out = np.empty((scales.shape[0], scales.shape[1] * repeat), kind)
    function("qkit_repeated")(scales.ctypes.data, scales.size, repeat, factor, TYPES.index(kind), out.ctypes.data)
    return out
