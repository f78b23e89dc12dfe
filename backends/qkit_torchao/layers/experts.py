"""Modules of experts whose weights come from elsewhere than their parameters; prepared and converted ones have it in common."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.rules import Rule
from qkit_torchao.layers import straight_through
from qkit_torchao.layers.shown import Shown
from qkit_torchao.layers.stacks import Stack
from qkit_torchao.torch_private import children, is_read_by, parameter

#: Python modules that want parameters themselves: they add adapters to them, merge them, or put others in their place.
OWNERS = ("torch.nn.utils.parametrize", "peft.tuners.lora.layer")
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}  #: those that `class_of` made


class Experts(Shown):
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
        if "parametrizations" in children(self):
            return self.forward_beside(*inputs, **named)
        return self.compute(*inputs, **named)

    def forward_beside(self, *inputs: Any, **named: Any) -> Any:
        """The forward of experts to whose parameters something else adds.

        Raises:
            BackendError: the experts have no parameters of their own to add to.
        """
        raise self.computed_elsewhere()

    def compute(self, *inputs: Any, **named: Any) -> Any:
        """The forward with the weights that the attributes of the stacks' names have."""
        if not self.rule.slots or self._is_off():
            return super().forward(*inputs, **named)
        if self.rule.range != "dynamic" or self.rule.activation is None:
            return self._one_by_one(*inputs, **named)
        if inputs:
            inputs = (self._on_grid(inputs[0]), *inputs[1:])
        else:
            named["hidden_states"] = self._on_grid(named["hidden_states"])
        config: Any = self.config
        eager = getattr(config, "_experts_implementation", None) in (None, "eager")
        alone = eager or self.rule.output is not None  # the other implementations show no output of a projection
        return self._one_by_one(*inputs, **named) if alone else super().forward(*inputs, **named)

    @property
    def adapter(self) -> str:
        """Kind and rank of the adapters, if any."""
        return ""

    def computed_elsewhere(self) -> BackendError:
        """The refusal of weights that another program computes."""
        return BackendError(
            f"a parametrization computes the weights of {self.base.__name__}, as peft's target_parameters do, and would pass by "
            "their grid: only peft's LoRA on prepared experts is known; give others adapters by qkit.adapt, or leave them float "
            "by a rule"
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
                y = self._on_outputs(self._multiply(y, up[expert], biases[0], expert), self.stacks[0], expert)
                y = self.on_range(self._apply_gate(y), "down_input", expert)
                y = self._on_outputs(self._multiply(y, down[expert], biases[1], expert), self.stacks[1], expert)
                y = y[token] if every else y
                y = y if norm is None else norm(y)
                out.index_add_(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out

    def on_range(self, x: Tensor, name: str, expert: int) -> Tensor:
        """An input or an output of one expert, see `qkit.expert_inputs.slots`, on its static grid; `x` itself without one."""
        raise NotImplementedError

    def grid_of(self, name: str) -> Grid | None:
        """The grid of a slot of experts: of the outputs of a projection, or of inputs."""
        return self.rule.output if name.endswith("_output") else self.rule.activation

    def _on_outputs(self, y: Tensor, stack: Stack, expert: int) -> Tensor:
        """The product with a stack, whose projections' outputs each are on a grid of their own; `y` itself without one."""
        grid = self.rule.output
        if grid is None:
            return y
        outputs = stack.split_products(y)
        for name, part in outputs.items():
            outputs[name] = (
                straight_through.fake_quantize(part, grid, ste=self.rule.ste)
                if self.rule.range == "dynamic"
                else self.on_range(part, f"{name}_output", expert)
            )
        return stack.join_products(outputs.values())

    def _routes_all(self) -> bool:
        """Whether every expert sees every token, for its ranges alone."""
        return False

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        y = x @ (weight if self.stacks[0].transposed else weight.t())
        return y if bias is None else y + bias[expert]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle makes the class again, which no module names."""
        return _again, (self.kind, self.base, tuple(stack.name for stack in self.stacks)), self.__dict__


def class_of(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> Any:
    """The class of `kind` for modules of class `base`, whose attributes `names` are properties in place of parameters."""
    key = kind, base, names
    if key not in _classes:
        _classes[key] = _class_of(kind, base, names)
    return _classes[key]


def _class_of(kind: type[Experts], base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def read(name: str, self: Any) -> Any:
        own = parameter(self, name)
        if own is not None and not torch.compiler.is_compiling() and is_read_by(*OWNERS):
            return own
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
