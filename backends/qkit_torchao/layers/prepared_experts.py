"""Prepared experts: the parameters of the module stay, and its class reads their values on the grid."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engines.kept import Store
from qkit.engines.layer import Mode
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.rules import Rule
from qkit_torchao.arithmetic import ranges
from qkit_torchao.cache import identity
from qkit_torchao.cache.identity import KeptOfTensor, cannot_cache
from qkit_torchao.layers import sharded, slots, straight_through
from qkit_torchao.layers.agreement import want_one_recipe
from qkit_torchao.layers.become import apply_but_keep, become
from qkit_torchao.layers.expert_inputs import OneExpert, check_activation, ranges_of
from qkit_torchao.layers.experts import Experts, class_of
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.stack_gradients import stacked, with_gradient
from qkit_torchao.layers.stacks import Stack, stacks_of
from qkit_torchao.torch_private import children, parameter, remove_buffers

_values: Store[KeptOfTensor[Tensor]] = Store()


class FakeExperts(Experts):
    """Experts that compute with their weights' quantized values, under any of transformers' implementations of experts.

    The gradient of the values is that of the parameters. The values are cached until a parameter changes.
    """

    gate: Tensor
    mode: Mode
    asked: bool = False
    calibrating: bool
    frozen: bool

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As `Experts.forward`; evaluation computes the values anew, since copies through `.data` leave no trace."""
        if not self.training and not torch.compiler.is_compiling():
            self._each(KeptOfTensor.drop)
        return super().forward(*inputs, **named)

    def forward_beside(self, *inputs: Any, **named: Any) -> Any:
        """The forward while peft's `target_parameters` add to the weights: with the values of the sums on the grid.

        Raises:
            BackendError: something else computes the weights, or they have adapters of qkit's besides.
        """
        lists: Any = self.parametrizations
        foreign = [one for each in lists.values() for one in each if not type(one).__module__.startswith("peft.")]
        if foreign or self.adapter:
            raise self.computed_elsewhere()
        mine = [stack for stack in self.stacks if stack.name in lists]
        for stack in mine:
            lists[stack.name].append(_OnGrid(self, stack))
        try:
            return self.compute(*inputs, **named)
        finally:
            for stack in mine:
                del lists[stack.name][-1]

    def _is_off(self) -> bool:
        return self.mode == "off"

    def train(self, mode: bool = True) -> Any:
        """As any module; besides, the next use recomputes the values."""
        self._each(KeptOfTensor.drop)
        return super().train(mode)

    def switch_mode(self, mode: Mode) -> None:
        """See `Modules.switch_mode`."""
        self.mode, self.calibrating = mode, mode == "calibrating"
        self.gate = gate(self.gate.device, on=mode != "off")
        if self.frozen:
            self._each(KeptOfTensor.thaw if mode == "off" else KeptOfTensor.freeze)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As any module; a float model's checkpoint has no ranges, and leaves them as they are."""
        for name in ranges_of(self.rule, self.stacks):
            state_dict.setdefault(f"{prefix}{name}", self.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *more)

    def freeze_values(self, on: bool) -> None:
        """See `Trains.freeze_values`."""
        if on and (sharded.is_managed(self) or any(cannot_cache(w) for w in self._weights())):
            raise BackendError(
                "values of experts cannot be frozen, since their weights cannot be watched: use interval 1"
            )
        self.frozen = on
        self._each(KeptOfTensor.freeze if on and self.mode != "off" else KeptOfTensor.thaw)

    def regrid(self, rule: Rule) -> None:
        """See `Trains.regrid`."""
        self.rule, self.asked = rule, False
        self._each(KeptOfTensor.freeze if self.frozen and self.mode != "off" else KeptOfTensor.thaw)

    def clear_ranges(self) -> None:
        """See `Modules.clear_ranges`."""
        for name in ranges_of(self.rule, self.stacks):
            buffer = self.get_buffer(name)
            buffer.copy_(torch.tensor(ranges.EMPTY).expand_as(buffer))

    def on_range(self, x: Tensor, name: str, expert: int) -> Tensor:
        """See `Experts.on_range`; while the experts calibrate, their ranges widen."""
        grid, rule = self.grid_of(name), self.rule
        if rule.range == "dynamic" or grid is None:
            return x
        static = slots.seen_scales(OneExpert(self, expert), x, name, grid)
        return x if self.calibrating else straight_through.fake_quantize(x, grid, ste=rule.ste, **static)

    def _routes_all(self) -> bool:
        return self.calibrating and getattr(self, "all_experts", False)

    def master(self, stack: Stack) -> Tensor:
        """The parameter of `stack`.

        Raises:
            BackendError: something else computes it.
        """
        weight = parameter(self, stack.name)
        if weight is None:
            raise self.computed_elsewhere()
        return weight

    def values_of(self, stack: Stack) -> Tensor:
        """The values of the parameter of `stack`, shaped and laid out as it is.

        Raises:
            AttributeError: a parametrization has the parameter; torch asks for that before it takes its place.
        """
        if parameter(self, stack.name) is None:
            raise AttributeError(stack.name)
        if not (torch.compiler.is_compiling() or self.asked):
            want_one_recipe(self)
        weight = self.master(stack)
        grid, ste = self.rule.weight, self.rule.ste
        assert grid is not None
        if torch.compiler.is_compiling():
            return torch.where(self.gate, stacked(weight, None, stack, grid, ste), weight)
        if self.mode == "off":
            return weight
        if sharded.is_managed(self) or cannot_cache(weight) or (self.frozen and not self.training):
            return with_gradient(weight, stack.values(weight.detach(), grid), stack, grid, ste)
        return with_gradient(weight, self._cached(weight, stack, grid), stack, grid, ste)

    def _cached(self, weight: Tensor, stack: Stack, grid: Grid) -> Tensor:
        kept, stamp = _kept(weight), (grid, *identity.state(weight))
        if (value := kept.current(stamp)) is not None:
            return value
        with torch.inference_mode(False), torch.no_grad():
            value = stack.values(weight.detach(), grid)  # in new memory: a backward may still need the old values
        kept.captured = kept.captured or bool(stamp[-1])
        return kept.put(value, stamp)

    def _weights(self) -> list[Tensor]:
        lists: Any = children(self).get("parametrizations") or {}
        found = (
            lists[stack.name].original if stack.name in lists else parameter(self, stack.name) for stack in self.stacks
        )
        return [weight for weight in found if weight is not None]

    def _each(self, verb: Callable[[KeptOfTensor[Tensor]], None]) -> None:
        for weight in self._weights():
            verb(_kept(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module; the gate is that of the new device."""
        apply_but_keep(self, fn, recurse, ranges_of(self.rule, self.stacks))
        self.gate = gate(self.gate.device, on=self.mode != "off")
        return self


class _OnGrid(nn.Module):
    """The last of several parametrizations of a parameter: values on the grid of `experts`, which is no part of it."""

    def __init__(self, experts: FakeExperts, stack: Stack) -> None:
        super().__init__()
        self.__dict__["experts"], self.stack = experts, stack

    def forward(self, weight: Tensor) -> Tensor:
        """The values of `weight`, with the gradient straight through; itself where the experts are off."""
        rule, mode = self.__dict__["experts"].rule, self.__dict__["experts"].mode
        assert rule.weight is not None
        return weight if mode == "off" else stacked(weight, None, self.stack, rule.weight, rule.ste)


def prepare_experts(module: nn.Module, rule: Rule, kind: type[FakeExperts] = FakeExperts) -> FakeExperts:
    """The training form of a module of experts: same parameters, hooks and mode, other class, of `kind`."""
    stacks = stacks_of(module)
    check_activation(module, rule)
    layer: FakeExperts = become(module, class_of(kind, type(module), tuple(stack.name for stack in stacks)))
    layer.rule, layer.stacks = rule, stacks
    layer.mode, layer.calibrating, layer.frozen = "on", False, False
    weight = parameter(layer, "down_proj")
    assert weight is not None
    layer.register_buffer("gate", gate(weight.device, on=True), persistent=False)
    for name in ranges_of(rule, stacks):
        empty = torch.tensor(ranges.EMPTY, device=weight.device)
        layer.register_buffer(name, empty.repeat(stacks[0].shape[0], 1))
    return layer


def restore_experts(layer: FakeExperts) -> nn.Module:
    """The module that `prepare_experts` was given, with the same parameters."""
    plain: nn.Module = become(layer, layer.base)
    for name in ("rule", "stacks", "mode", "calibrating", "frozen", "all_experts"):
        plain.__dict__.pop(name, None)
    remove_buffers(plain, "gate", *ranges_of(layer.rule, layer.stacks))
    return plain


def _kept(weight: Tensor) -> KeptOfTensor[Tensor]:
    return _values.of(weight) or KeptOfTensor(weight, _values)
