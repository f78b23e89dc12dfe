"""Low-rank adapters that merge without loss: trained through the grid's value of the merged weight, on any engine."""

from qkit.adapters.files import load, save
from qkit.adapters.surgery import adapt, merge
from qkit.adapters.update import Adapter, Update

__all__ = ["Adapter", "Update", "adapt", "load", "merge", "save"]
