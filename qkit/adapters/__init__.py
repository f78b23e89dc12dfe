"""Low-rank adapters that merge without loss: trained through the grid's value of the merged weight, on any engine.

peft's and mlx-lm's own adapters work on prepared layers too, as float beside the grid: FQ(W) + B A. Merged, such a layer is
FQ(W + B A), another function than the trained one; `benchmarks/merge_gap.py` measures it.
"""

from qkit.adapters.adapter import Adapter, adapter_from_table
from qkit.adapters.files import load, save
from qkit.adapters.surgery import adapt, merge
from qkit.reference.merged import Update

__all__ = ["Adapter", "Update", "adapt", "adapter_from_table", "load", "merge", "save"]
