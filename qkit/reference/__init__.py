"""The law: each rule of `numerics.md` as a page of NumPy. Engines compute the same bits."""

from qkit.reference import learned, merged, packing, ranges, rounding, stored
from qkit.reference.fitting import fit
from qkit.reference.rounding import dequantize, fake_quantize, quantize, scale_values, unclipped
from qkit.reference.stored import fake_requantize, requantize

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_requantize",
    "fit",
    "learned",
    "merged",
    "packing",
    "quantize",
    "ranges",
    "requantize",
    "rounding",
    "scale_values",
    "stored",
    "unclipped",
]
