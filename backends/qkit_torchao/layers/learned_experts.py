"""Prepared experts that learn the scales of their weights, each expert its own; and the entry for all prepared experts."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.grid import Grid
from qkit.reference.learned import FIRST, FIRSTS, NAMES, is_offset, names, stored_names
from qkit.rules import Rule
from qkit_torchao.arithmetic.learned import initial, values_alone
from qkit_torchao.layers import learned, prepared_experts
from qkit_torchao.layers.computed_experts import ComputedExperts
from qkit_torchao.layers.expert_inputs import projections_of
from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.layers.stacks import Stack
from qkit_torchao.torch_private import remove_parameters


class LearnedExperts(ComputedExperts):
    """Experts with parameters such as `gate_proj_weight_scale` [experts, ...], see `qkit.reference.learned`."""

    def on_grid(self, weight: Tensor, stack: Stack) -> Tensor:
        """See `ComputedExperts.on_grid`."""
        grid = self.rule.weight
        assert grid is not None
        parts = stack.split(weight).items()
        values = values_alone if self.rule.scales == "alone" else learned.fake_quantize
        return stack.join(_values(values, part, grid, list(_of(self, name).values())) for name, part in parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but learned scales stay in float32."""
        mine = [one for found in parameters_of(self).values() for one in found.values()]
        before = [one.detach() for one in mine]
        super()._apply(fn, recurse)
        after = [one for found in parameters_of(self).values() for one in found.values()]
        for one, was in zip(after, before, strict=True):
            if one.dtype != was.dtype:
                one.data = was.to(one.device)
        return self


def prepare_experts(module: nn.Module, rule: Rule) -> FakeExperts:
    """The training form of a module of experts: same parameters, hooks and mode, other class.

    Learned scales begin with those of the grid's rule, and train if the weight does.
    """
    if rule.scales == "rule":
        return prepared_experts.prepare_experts(module, rule)
    layer: FakeExperts = prepared_experts.prepare_experts(module, rule, LearnedExperts)
    assert rule.weight is not None
    alone = rule.scales == "alone"
    for stack in layer.stacks:
        weight = layer.master(stack)
        trains = weight.requires_grad
        for name, part in stack.split(weight.detach()).items():
            for own, value in zip(names(rule.weight), _initial(part, rule.weight), strict=True):
                moves = trains and not (alone and is_offset(own))
                layer.register_parameter(f"{name}_{own}", nn.Parameter(value, requires_grad=moves))
                if alone:
                    layer.register_parameter(f"{name}_{FIRST}{own}", nn.Parameter(value.clone(), requires_grad=False))
        weight.requires_grad_(trains and not alone)
    return layer


def restore_experts(layer: FakeExperts) -> nn.Module:
    """The module that `prepare_experts` was given, with the same parameters."""
    plain = prepared_experts.restore_experts(layer)
    remove_parameters(plain, *learned_names(layer.stacks))
    return plain


def parameters_of(module: Any) -> dict[str, dict[str, Tensor]]:
    """By projection, the parameters that the experts learn beside it, by the names of `qkit.reference.learned`."""
    return {name: _of(module, name) for name in projections_of(module.stacks)}


def learned_names(stacks: Iterable[Stack]) -> list[str]:
    """The names of all parameters that experts could learn beside their weights."""
    return [f"{name}_{own}" for name in projections_of(stacks) for own in (*NAMES, *FIRSTS)]


def _of(module: Any, projection: str) -> dict[str, Tensor]:
    return {
        own: module.get_parameter(f"{projection}_{own}") for own in stored_names(module.rule.weight, module.rule.scales)
    }


def _initial(part: Tensor, grid: Grid) -> list[Tensor]:
    """The first parameters of all experts, [experts, ...]."""
    each = [initial(one.contiguous(), grid) for one in part]
    return [torch.stack(several) for several in zip(*each, strict=True)]


def _values(values: Callable[..., Tensor], part: Tensor, grid: Grid, parameters: list[Tensor]) -> Tensor:
    if grid.by_rows:
        return values(part.contiguous(), grid, *parameters)
    each = zip(part, *parameters, strict=True)
    return torch.stack([values(one.contiguous(), grid, *mine) for one, *mine in each])
