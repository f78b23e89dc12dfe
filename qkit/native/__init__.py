"""The same bits as `qkit.reference`, compiled: quantizing, fake-quantizing and packing on the CPU, in NumPy's memory.

Built where there is a C compiler, see `build.py`; where it is not, `available()` is False and NumPy does the same work.
"""

from qkit.native.arrays import extremes, fake_quantize, pack, quantize, quantize_packed, use_threads
from qkit.native.library import available

__all__ = ["available", "extremes", "fake_quantize", "pack", "quantize", "quantize_packed", "use_threads"]
