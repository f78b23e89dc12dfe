"""qkit: train on the grid you ship, prove it, run it anywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkit.startup import interruptible as _interruptible

with _interruptible():
    from qkit.arrays import dequantize, fake_quantize, fit, quantize
    from qkit.element import Element
    from qkit.engines.registry import backend, backends, recipe, recipes
    from qkit.errors import (
        ArtifactError,
        BackendError,
        DivergedError,
        DTypeError,
        GridError,
        LockedError,
        PlanError,
        QkitError,
        RangeError,
        RecipeError,
        RunError,
        StageError,
        VerificationError,
    )
    from qkit.exactness import exact
    from qkit.grid import Grid
    from qkit.qtensor import QTensor
    from qkit.rules import Recipe, Rule

if TYPE_CHECKING:
    from qkit import reference
    from qkit.adapters import Adapter, adapt, merge
    from qkit.artifact.load import load
    from qkit.artifact.save import save
    from qkit.coverage_table import coverage
    from qkit.engines.protocol import BackendSpec
    from qkit.fitting.fits import Fit
    from qkit.pipeline import adamw, convert, gather, prepare
    from qkit.restaging import regrid, unprepare
    from qkit.switches import calibrating, disable, disabled, enable

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "ArtifactError",
    "BackendError",
    "BackendSpec",
    "DTypeError",
    "DivergedError",
    "Element",
    "Fit",
    "Grid",
    "GridError",
    "LockedError",
    "PlanError",
    "QTensor",
    "QkitError",
    "RangeError",
    "Recipe",
    "RecipeError",
    "Rule",
    "RunError",
    "StageError",
    "VerificationError",
    "__version__",
    "adamw",
    "adapt",
    "backend",
    "backends",
    "calibrating",
    "convert",
    "coverage",
    "dequantize",
    "disable",
    "disabled",
    "enable",
    "exact",
    "fake_quantize",
    "fit",
    "gather",
    "load",
    "merge",
    "prepare",
    "quantize",
    "recipe",
    "recipes",
    "reference",
    "regrid",
    "save",
    "unprepare",
]


#: The modules of the names that are imported on first use: calls on models and files would double the cost of `import qkit`.
_LATER = {
    **dict.fromkeys(("adamw", "convert", "gather", "prepare"), "pipeline"),
    **dict.fromkeys(("regrid", "unprepare"), "restaging"),
    **dict.fromkeys(("calibrating", "disable", "disabled", "enable"), "switches"),
    "BackendSpec": "engines.protocol",
    "Fit": "fitting.fits",
    "coverage": "coverage_table",
    "load": "artifact.load",
    "save": "artifact.save",
    **dict.fromkeys(("Adapter", "adapt", "merge"), "adapters"),
}


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("qkit.reference")
    if name in _LATER:
        return getattr(import_module(f"qkit.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
