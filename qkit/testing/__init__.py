"""The proof of a backend: hard tensors, every grid, and the Conformance suite (which needs pytest)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkit.testing.hard_tensors import all_grids, random, tensors

if TYPE_CHECKING:
    from qkit.testing.conformance import ArrayConformance, Conformance

__all__ = ["ArrayConformance", "Conformance", "all_grids", "random", "tensors"]


def __getattr__(name: str) -> Any:
    if name in ("ArrayConformance", "Conformance"):  # on first use: `qkit parity` needs the tensors, and no pytest
        return getattr(import_module("qkit.testing.conformance"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
