"""The inputs of each expert of a float model, which its own code does not show: those of gate and up, and those of down."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engines.blocks import Mixture
from qkit.grid import Grid
from qkit_torchao.layers.stacks import stacks_of
from qkit_torchao.torch_private import parameter

GATE = "_apply_gate"  #: transformers' name for the function between the products of experts with gates
Add = Callable[[str, Grid | None, Tensor], None]  #: takes a path in files, a grid, and inputs [tokens, n]


def watching(mixture: Mixture, add: Add) -> Callable[..., None]:
    """A hook before the forward of experts, which computes their inputs once more and gives them to `add`.

    Modules that transformers' implementations of experts do not run show no input of the down projection: it adds nothing.
    """

    def see(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given, activate = (*args, *named.values()), _activation(module)
        if activate is None or len(given) < 2:  # as Llama 4's, each of which gets all tokens
            return
        x, chosen = given[:2]
        x = x.flatten(0, -2)
        chosen, (up, *_) = chosen.reshape(len(x), -1), stacks_of(module)
        weight, bias = parameter(module, up.name), getattr(module, f"{up.name}_bias", None)
        assert weight is not None
        for expert in range(up.shape[0]):
            tokens = torch.where(chosen == expert)[0]
            if not len(tokens):
                continue
            mine = x[tokens]
            for projection in up.projections:
                add(mixture.paths[expert, projection], mixture.grid, mine)
            y = mine @ (weight[expert] if up.transposed else weight[expert].t())
            add(mixture.paths[expert, "down_proj"], mixture.grid, activate(y if bias is None else y + bias[expert]))

    return see


def _activation(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The function between the two products of an expert; None where the class does not show it."""
    if not hasattr(type(module), GATE):
        return None
    found: Callable[[Tensor], Tensor] = getattr(module, GATE) if module.has_gate else module.act_fn
    return found
