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
from qkit.rules import Rule
from qkit_torchao.arithmetic import ranges
from qkit_torchao.cache import identity
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.layers import sharded, slots, straight_through
from qkit_torchao.layers.become import apply_but_keep, become
from qkit_torchao.layers.expert_inputs import OneExpert, check_activation, ranges_of
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.prepared import cannot_cache
from qkit_torchao.layers.stack_gradients import stacked, with_gradient
from qkit_torchao.layers.stacks import Stack, stacks_of
from qkit_torchao.torch_private import parameter, remove_buffers

_values: Store[KeptOfTensor[Tensor]] = Store()
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}  #: those that `class_of` made


class Experts(nn.Module):
    """The common part of prepared and converted experts: a class made for that of the module, which reads its weights elsewhere.

    Attributes:
        kind, base: the class whose subclass it is, and the class of the module before.
        stacks: the parameters that held the weights.
    """

    kind: "type[Experts]"
    base: type[nn.Module]
    rule: Rule
    stacks: tuple[Stack, ...]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the module computes it, with the weights of this class.

        Raises:
            BackendError: something else computes the weights, such as peft's adapters on parameters of experts.
        """
        if hasattr(self, "parametrizations"):
            raise self._computed_elsewhere()
        if self.rule.activation is None or self._is_off():
            return super().forward(*inputs, **named)
        if self.rule.range != "dynamic":
            return self._one_by_one(*inputs, **named)
        if inputs:
            inputs = (self._on_grid(inputs[0]), *inputs[1:])
        else:
            named["hidden_states"] = self._on_grid(named["hidden_states"])
        config: Any = self.config
        eager = getattr(config, "_experts_implementation", None) in (None, "eager")
        return self._one_by_one(*inputs, **named) if eager else super().forward(*inputs, **named)

    def _computed_elsewhere(self) -> BackendError:
        return BackendError(
            f"a parametrization computes the weights of {self.base.__name__}, as peft's target_parameters do, and would pass by "
            "their grid: take it off before prepare or convert, or leave experts float by a rule"
        )

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The input of the down projection, on the grid of the inputs."""
        made: Tensor = super()._apply_gate(gate_up)  # type: ignore[misc]
        dynamic = self.rule.activation is not None and self.rule.range == "dynamic"
        return self._on_grid(made) if dynamic and not self._is_off() else made

    def _on_grid(self, x: Tensor) -> Tensor:
        assert self.rule.activation is not None
        return straight_through.fake_quantize(x, self.rule.activation, ste=self.rule.ste)

    def _is_off(self) -> bool:
        return False

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As transformers' eager implementations, most of which pass by `_apply_gate`.

        Args:
            x: [tokens, inputs].
            chosen: numbers of experts [tokens, several].
            weights: of these experts, [tokens, several].
        """
        up, down = (getattr(self, stack.name) for stack in self.stacks)
        biases = [getattr(self, f"{stack.name}_bias", None) for stack in self.stacks]
        norm, out = getattr(self, "post_expert_norm", None), torch.zeros_like(x)
        every = self._routes_all()
        for expert in range(self.stacks[0].shape[0]):
            token, place = torch.where(chosen == expert)
            if token.numel() or every:
                y = self.on_range(x if every else x[token], "up_input", expert)
                y = self._apply_gate(self._multiply(y, up[expert], biases[0], expert))
                y = self.on_range(y, "down_input", expert)
                y = self._multiply(y[token] if every else y, down[expert], biases[1], expert)
                y = y if norm is None else norm(y)
                out.index_add_(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out

    def on_range(self, x: Tensor, name: str, expert: int) -> Tensor:
        """An input of one expert on its static grid; `x` itself where there is none."""
        raise NotImplementedError

    def _routes_all(self) -> bool:
        """Whether every expert sees every token, for its ranges alone."""
        return False

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        y = x @ (weight if self.stacks[0].transposed else weight.t())
        return y if bias is None else y + bias[expert]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle makes the class again, which no module names."""
        return _again, (self.kind, self.base, tuple(stack.name for stack in self.stacks)), self.__dict__


class FakeExperts(Experts):
    """Experts that compute with their weights' quantized values, under any of transformers' implementations of experts.

    The gradient of the values is that of the parameters. The values are cached until a parameter changes.
    """

    gate: Tensor
    mode: Mode
    calibrating: bool
    frozen: bool

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As `Experts.forward`; evaluation computes the values anew, since copies through `.data` leave no trace."""
        if not self.training and not torch.compiler.is_compiling():
            self._each(KeptOfTensor.drop)
        return super().forward(*inputs, **named)

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
        for name in ranges_of(self.rule):
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
        self.rule = rule
        self._each(KeptOfTensor.freeze if self.frozen and self.mode != "off" else KeptOfTensor.thaw)

    def clear_ranges(self) -> None:
        """See `Modules.clear_ranges`."""
        for name in ranges_of(self.rule):
            buffer = self.get_buffer(name)
            buffer.copy_(torch.tensor(ranges.EMPTY).expand_as(buffer))

    def on_range(self, x: Tensor, name: str, expert: int) -> Tensor:
        """See `Experts.on_range`; while the experts calibrate, their ranges widen."""
        grid, rule = self.rule.activation, self.rule
        if rule.range == "dynamic" or grid is None:
            return x
        static = slots.seen_scales(OneExpert(self, expert), x, name, grid)
        return x if self.calibrating else straight_through.fake_quantize(x, grid, ste=rule.ste, **static)

    def _routes_all(self) -> bool:
        return self.calibrating and getattr(self, "all_experts", False)

    def values_of(self, stack: Stack) -> Tensor:
        """The values of the parameter of `stack`, shaped and laid out as it is."""
        weight, grid, ste = parameter(self, stack.name), self.rule.weight, self.rule.ste
        if weight is None:
            raise self._computed_elsewhere()
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
        found = (parameter(self, stack.name) for stack in self.stacks)
        return [weight for weight in found if weight is not None]

    def _each(self, verb: Callable[[KeptOfTensor[Tensor]], None]) -> None:
        for weight in self._weights():
            verb(_kept(weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module; the gate is that of the new device."""
        apply_but_keep(self, fn, recurse, list(ranges_of(self.rule)))
        self.gate = gate(self.gate.device, on=self.mode != "off")
        return self


def prepare_experts(module: nn.Module, rule: Rule) -> FakeExperts:
    """The training form of a module of experts: same parameters, hooks and mode, other class."""
    stacks = stacks_of(module)
    check_activation(module, rule)
    layer: FakeExperts = become(module, class_of(FakeExperts, type(module), tuple(stack.name for stack in stacks)))
    layer.rule, layer.stacks = rule, stacks
    layer.mode, layer.calibrating, layer.frozen = "on", False, False
    weight = parameter(layer, "down_proj")
    assert weight is not None
    layer.register_buffer("gate", gate(weight.device, on=True), persistent=False)
    for name in ranges_of(rule):
        empty = torch.tensor(ranges.EMPTY, device=weight.device)
        layer.register_buffer(name, empty.repeat(stacks[0].shape[0], 1))
    return layer


def restore_experts(layer: FakeExperts) -> nn.Module:
    """The module that `prepare_experts` was given, with the same parameters."""
    plain: nn.Module = become(layer, layer.base)
    for name in ("rule", "stacks", "mode", "calibrating", "frozen", "all_experts"):
        plain.__dict__.pop(name, None)
    remove_buffers(plain, "gate", *ranges_of(layer.rule))
    return plain


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
    return type(
        f"{kind.__name__}Of{base.__name__}",
        (kind, base),
        {**properties, "kind": kind, "base": base, "__module__": __name__},
    )


def _again(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = class_of(kind, base, names)
    made: nn.Module = cls.__new__(cls)
    return made


def _kept(weight: Tensor) -> KeptOfTensor[Tensor]:
    return _values.of(weight) or KeptOfTensor(weight, _values)
