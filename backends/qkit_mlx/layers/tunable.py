"""The sides of quantized layers that mlx-lm's LoRA and DoRA see. Imports no mlx-lm."""

from math import sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.errors import StageError
from qkit.reference.merged import Update
from qkit_mlx.layers.shown import Shown
from qkit_mlx.mlx_private import is_read_by

DORA = "mlx_lm.tuner.dora"  #: the module of layers that read the weight of another layer and multiply it themselves


class Tunable(nn.Module):
    """A linear layer that mlx-lm's `linear_to_lora_layers` gives an adapter inside of its grid, by its method `to_lora`.

    The merge of such an adapter is exact, see `qkit.adapt`. mlx-lm's `fuse` returns the merged layer, still on its grid.
    """

    rule: Any

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """This layer with LoRA of rank `r`, whose product is multiplied by `scale`.

        Raises:
            StageError: there is dropout, or the layer cannot take an adapter inside of its grid.
        """
        from qkit_mlx.layers.adapted import adapt  # here, since adapted layers are layers of this kind

        layer: nn.Module = adapt(self, first_update(self, r, dropout, scale))
        return layer


def first_update(module: Any, r: int, dropout: float, scale: float) -> Update:
    """The first factors of LoRA of rank `r` on a layer or a stack of experts; A as mlx-lm draws it, B zero.

    Raises:
        StageError: there is dropout, or the layer cannot take an adapter inside of its grid.
    """
    if dropout:
        raise StageError(
            f"an adapter inside of a grid has no dropout, and dropout is {dropout}: set it to 0, or leave the model in float"
        )
    if reason := _obstacle(module):
        raise StageError(f"a layer on {module.rule.weight} cannot take LoRA: {reason}")
    *experts, outputs, width = module["weight"].shape
    inputs = getattr(module, "inputs", width)  # packed words are fewer
    a = mx.random.uniform(-1 / sqrt(inputs), 1 / sqrt(inputs), (*experts, r, inputs))
    packed = "scales" in module  # a base of codes
    return Update(np.array(a), np.zeros((*experts, outputs, r), np.float32), float(scale), dithered=packed)


class Readable(Shown):
    """A prepared layer whose master weight mlx-lm's DoRA reads on the grid, since DoRA does not call the layer."""

    rule: Any

    @property
    def weight(self) -> mx.array:
        """The master weight; for mlx-lm's DoRA its quantized values, through which gradients pass straight.

        Raises:
            StageError: DoRA reads the weight of a layer whose input or output has a grid, which DoRA would leave out.
        """
        master: mx.array = self["weight"]
        if not is_read_by(DORA):
            return master
        if self.rule.slots:
            raise StageError(
                "mlx-lm's DoRA multiplies weights itself, and would leave out the grids of inputs and outputs: use "
                'qkit.adapt(model, qkit.Adapter(kind="dora"))'
            )
        return self.grid_values()

    @weight.setter
    def weight(self, value: mx.array) -> None:
        self["weight"] = value

    def grid_values(self) -> mx.array:
        """The values that the layer multiplies with."""
        from qkit_mlx.layers.prepared import values_of  # here, since prepared layers are layers of this kind

        return values_of(self, self["weight"])


def _obstacle(module: Any) -> str:
    if getattr(module, "adapter", ""):
        return "it has an adapter already"
    if module.rule.scales != "rule":
        return "its scales are learned, and a merge would choose others"
    if "scales" in module and module.rule.weight.scale == "midmax":
        return "its codes would move when they are quantized again: put adapters on the prepared float model"
    return ""
