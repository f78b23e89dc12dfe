"""Compiled kernels with the bits of `qkit.reference`: they quantize, fake-quantize, pack and interleave NumPy arrays on the CPU.

`build.py` compiles them where there is a C compiler. Without one, `available()` is False and callers use `qkit.reference`.
The kernels declare their elements and scale rules, see `takes` and `packs`; the law computes every other one here too.
"""

from qkit.native.arrays import extremes, fake_quantize, pack, quantize, quantize_packed, use_threads
from qkit.native.blocks import halves, interleave, repeated, scaled_blocks, span
from qkit.native.library import available, packs, takes

__all__ = [
    "available",
    "extremes",
    "fake_quantize",
    "halves",
    "interleave",
    "pack",
    "packs",
    "quantize",
    "quantize_packed",
    "repeated",
    "scaled_blocks",
    "span",
    "takes",
    "use_threads",
]
