"""Blocks of codes, each after its scales, as GGUF stores them. One thread: the callers work on several weights at one time."""

import numpy as np
from numpy.typing import NDArray

from qkit.native.library import function


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
