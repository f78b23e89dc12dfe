"""The verbs of `qkit.engines.norms` for the MLX engine, which inherits them."""

from collections.abc import Collection, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit_mlx.mlx_private import frozen_names
from qkit_mlx.models import names
from qkit_mlx.models.groups import join

PARTS = ("weight", "bias")


class Norms:
    """Norms that train beside adapters."""

    def norms(self, model: nn.Module) -> dict[str, bool]:
        """See `TrainsNorms.norms`."""
        return {name: key not in frozen_names(module) for name, module, key in _of_norms(model)}

    def train_norms(self, model: nn.Module, names: Collection[str]) -> None:
        """See `TrainsNorms.train_norms`."""
        for name, module, key in _of_norms(model):
            if name in names:
                frozen_names(module).discard(key)


def _of_norms(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Name in files, module and key of the arrays of norms, known by the names of their classes."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "Norm" not in kind or "BatchNorm" in kind:
            continue
        for key in PARTS:
            array = module.get(key)
            if isinstance(array, mx.array) and array.ndim == 1:
                yield names.outward(join(path, key), model), module, key
