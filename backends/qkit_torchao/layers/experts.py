"""Prepared experts: the parameters of the module stay, and its class reads their values on the grid."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engines.kept import Store
from qkit.engines.layer import Mode
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.rules import Rule, Ste
from qkit_torchao.cache import identity
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.layers import sharded, straight_through
from qkit_torchao.layers.become import become
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.prepared import cannot_cache
from qkit_torchao.layers.stacks import Stack, stacks_of
from qkit_torchao.torch_private import apply, parameter

_values: Store[KeptOfTensor[Tensor]] = Store()
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}  #: those that `class_of` made


class Experts(nn.Module):
    """The common part of prepared and converted experts: a class made for that of the module, which reads its weights elsewhere.

    Attributes:
        base: the class of the module before.
        stacks: the parameters that held the weights.
    """

    base: type[nn.Module]
    rule: Rule
    stacks: tuple[Stack, ...]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the module computes it, with the weights of this class.

        Raises:
            BackendError: something else computes the weights, such as peft's adapters on parameters of experts.
        """
        if hasattr(self, "parametrizations"):
            raise BackendError(
                f"a parametrization computes the weights of {self.base.__name__}, as peft's target_parameters do, and would pass "
                "by their grid: take it off before prepare or convert, or leave experts float by a rule"
            )
        return super().forward(*inputs, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle makes the class again, which no module names."""
        kind = next(one for one in type(self).__mro__ if one.__module__ == __name__ or one.__name__ == "PackedExperts")
        return _again, (kind, self.base, tuple(stack.name for stack in self.stacks)), self.__dict__


class FakeExperts(Experts):
    """Experts that compute with their weights' quantized values, under any of transformers' implementations of experts.

    The gradient of the values is that of the parameters. The values are cached until a parameter changes.
    """

    gate: Tensor
    mode: Mode
    calibrating: bool
    frozen: bool

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
        self.rule = rule
        self._each(KeptOfTensor.freeze if self.frozen and self.mode != "off" else KeptOfTensor.thaw)

    def clear_ranges(self) -> None:
        """See `Modules.clear_ranges`; experts have none."""

    def values_of(self, stack: Stack) -> Tensor:
        """The values of the parameter of `stack`, shaped and laid out as it is."""
        weight, grid, ste = parameter(self, stack.name), self.rule.weight, self.rule.ste
        assert weight is not None
        assert grid is not None
        if torch.compiler.is_compiling():
            return torch.where(self.gate, _stacked(weight, None, stack, grid, ste), weight)
        if self.mode == "off":
            return weight
        if sharded.is_managed(self) or cannot_cache(weight) or (self.frozen and not self.training):
            return _with_gradient(weight, stack.values(weight.detach(), grid), stack, grid, ste)
        return _with_gradient(weight, self._cached(weight, stack, grid), stack, grid, ste)

    def _cached(self, weight: Tensor, stack: Stack, grid: Grid) -> Tensor:
        kept, stamp = _kept(weight), (grid, *identity.state(weight))
        if (value := kept.current(stamp)) is not None:
            return value
        with torch.inference_mode(False), torch.no_grad():
            value = stack.values(weight.detach(), grid)  # in new memory: a backward may still need the old values
        kept.captured = kept.captured or bool(stamp[-1])
        return kept.put(value, stamp)

    def _weights(self) -> list[Tensor]:
        found = (parameter(self, stack.name) for stack in self.stacks)
        return [weight for weight in found if weight is not None]

    def _each(self, verb: Callable[[KeptOfTensor[Tensor]], None]) -> None:
        for weight in self._weights():
            verb(_kept(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module; the gate is that of the new device."""
        apply(self, fn, recurse)
        self.gate = gate(self.gate.device, on=self.mode != "off")
        return self


def prepare_experts(module: nn.Module, rule: Rule) -> FakeExperts:
    """The training form of a module of experts: same parameters, hooks and mode, other class."""
    stacks = stacks_of(module)
    layer: FakeExperts = become(module, class_of(FakeExperts, type(module), tuple(stack.name for stack in stacks)))
    layer.rule, layer.stacks = rule, stacks
    layer.mode, layer.calibrating, layer.frozen = "on", False, False
    weight = parameter(layer, "down_proj")
    assert weight is not None
    layer.register_buffer("gate", gate(weight.device, on=True), persistent=False)
    return layer


def class_of(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> Any:
    """The class of `kind` for modules of class `base`, whose attributes `names` are properties in place of parameters."""
    key = kind, base, names
    if key not in _classes:
        _classes[key] = _class_of(kind, base, names)
    return _classes[key]


def _class_of(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def read(name: str, self: Any) -> Any:
        return self.values_of(next(stack for stack in self.stacks if stack.name == name))

    properties = {name: property(partial(read, name)) for name in names}
    return type(f"{kind.__name__}Of{base.__name__}", (kind, base), {**properties, "base": base, "__module__": __name__})


def _again(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = class_of(kind, base, names)
    made: nn.Module = cls.__new__(cls)
    return made


def _kept(weight: Tensor) -> KeptOfTensor[Tensor]:
    return _values.of(weight) or KeptOfTensor(weight, _values)


def _with_gradient(weight: Tensor, values: Tensor, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
    """`values`, with the gradient of `weight` straight through, masked where `ste` says so."""
    if ste == "identity":
        return straight_through.values_view(weight, values, grid, ste=ste)
    return _stacked(weight, values, stack, grid, ste)


def _stacked(weight: Tensor, values: Tensor | None, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
    result: Tensor = _Stacked.apply(weight, values, stack, grid, ste)  # type: ignore[no-untyped-call]
    return result


class _Stacked(torch.autograd.Function):
    """Forward: the values of a stack. Backward: the gradient as it comes, or masked."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor | None, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
        ctx.stack, ctx.grid, ctx.ste = stack, grid, ste
        if ste == "masked":
            ctx.save_for_backward(weight)
        return stack.values(weight, grid) if values is None else values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.ste == "masked":
            (weight,) = ctx.saved_tensors
            gradient = straight_through.masked(gradient, ctx.stack.unclipped(weight, ctx.grid))
        return gradient, None, None, None, None
