"""The law: each rule of `numerics.md` as a page of NumPy. Engines compute the same bits."""

from qkit.reference import learned, merged, packing, ranges, rounding
from qkit.reference.fitting import fit
from qkit.reference.rounding import dequantize, fake_quantize, quantize, scale_values, unclipped

__all__ = [
    "dequantize",
    "fake_quantize",
    "fit",
    "learned",
    "merged",
    "packing",
    "quantize",
    "ranges",
    "rounding",
    "scale_values",
    "unclipped",
]
