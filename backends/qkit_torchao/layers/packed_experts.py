"""Converted experts: packed codes, decoded expert by expert as they are used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.expert_inputs import static_names
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.rules import Rule
from qkit_torchao.arithmetic import bit_streams, rounding
from qkit_torchao.kernels import choose
from qkit_torchao.layers import straight_through
from qkit_torchao.layers.become import apply_but_keep, become
from qkit_torchao.layers.execution import Execution
from qkit_torchao.layers.expert_inputs import OneExpert, check_activation, projections_of, ranges_of
from qkit_torchao.layers.experts import Experts, class_of
from qkit_torchao.layers.learned_experts import learned_names
from qkit_torchao.layers.slots import static_scales
from qkit_torchao.layers.stacks import Stack, stacks_of
from qkit_torchao.torch_private import remove_buffers, remove_parameters

PARTS = ("codes", "scales", "zeros", "tensor_scale", "biases")
GROUPED = (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
EXECUTION = Execution(native=False, text="expert by expert, as tokens reach them", layout="bytes")


class PackedExperts(Experts):
    """Experts of packed codes. Their weights are `Decoded`, which transformers' implementations of experts use as tensors."""

    dtype: DType
    execution: Execution

    def values_of(self, stack: Stack) -> Any:
        """The weights of `stack`; compiled code decodes all of them."""
        decoded = Decoded(self, stack)
        return decoded.whole() if torch.compiler.is_compiling() else decoded

    def quantized(self, projection: str, expert: int) -> QTensor[Tensor]:
        """The codes and scales of one expert's projection, [outputs, inputs]."""
        grid = self.rule.weight
        assert grid is not None
        parts = {name: self.get_buffer(f"{projection}_{name}")[expert] for name in self._parts(grid)}
        inputs = next(stack.shape[2] for stack in self.stacks if projection in stack.projections)
        parts["codes"] = bit_streams.unpack(parts["codes"], grid.element, inputs, symmetric=grid.symmetric)
        return QTensor(grid=grid, dtype=self.dtype, **parts)

    def decoded(self, stack: Stack, expert: int) -> Tensor:
        """The weight of one expert, laid out as in the parameter of `stack`."""
        with torch.no_grad():
            return stack.join(choose.dequantize(self.quantized(name, expert)) for name in stack.projections)

    def on_range(self, x: Tensor, name: str, expert: int) -> Tensor:
        """See `Experts.on_range`."""
        grid = self.grid_of(name)
        if self.rule.range == "dynamic" or grid is None:
            return x
        return straight_through.fake_quantize(x, grid, **static_scales(OneExpert(self, expert), name, grid))

    def _parts(self, grid: Grid) -> tuple[str, ...]:
        more = {"zeros": grid.has_zeros, "tensor_scale": grid.has_tensor_scale, "biases": grid.has_biases}
        return tuple(name for name in PARTS if more.get(name, True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the codes and keeps the scales as they are: a cast changes only the type that values are rounded to."""
        grid = self.rule.weight
        assert grid is not None
        names = [f"{name}_{part}" for stack in self.stacks for name in stack.projections for part in self._parts(grid)]
        names += static_of(self)
        device = self.get_buffer(names[0]).device
        self.dtype = dtype_of(fn(torch.zeros((), dtype=rounding.DTYPE[self.dtype], device=device)))
        apply_but_keep(self, fn, recurse, names)
        return self


class Decoded:
    """The weights of a stack of converted experts, for code that takes a parameter: each use decodes the experts that it needs.

    Indexing gives a tensor. A grouped product decodes the experts that have tokens, one at a time. Every other operation decodes
    all experts.
    """

    def __init__(self, layer: PackedExperts, stack: Stack, *, swapped: bool = False) -> None:
        self._layer, self._stack, self._swapped = layer, stack, swapped

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        return rounding.DTYPE[self._layer.dtype]

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self._layer.get_buffer(f"{self._stack.projections[0]}_codes").device

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        experts, outputs, inputs = self._stack.shape
        outputs *= len(self._stack.projections)
        across = self._stack.transposed != self._swapped
        return torch.Size((experts, inputs, outputs) if across else (experts, outputs, inputs))

    def __getitem__(self, index: Any) -> Tensor:
        """The weight of one expert, or those of several that a tensor names."""
        if isinstance(index, Tensor) and index.dim():
            chosen, places = index.unique(return_inverse=True)
            return torch.stack([self._one(int(expert)) for expert in chosen.tolist()])[places]
        if isinstance(index, (int, Tensor)):
            return self._one(int(index))
        return self.whole()[index]

    def transpose(self, one: int, other: int) -> Any:
        """The two last axes swapped."""
        if {one % 3, other % 3} != {1, 2}:
            return self.whole().transpose(one, other)
        return Decoded(self._layer, self._stack, swapped=not self._swapped)

    def whole(self) -> Tensor:
        """All experts as one tensor."""
        return torch.stack([self._one(expert) for expert in range(self.shape[0])])

    def __getattr__(self, name: str) -> Any:
        """Anything else that a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def _one(self, expert: int) -> Tensor:
        weight = self._layer.decoded(self._stack, expert)
        return weight.transpose(-1, -2) if self._swapped else weight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function in GROUPED and len(args) > 1 and isinstance(args[1], cls) and "offs" in named:
            return _grouped(args[0], args[1], named["offs"])
        whole = [one.whole() if isinstance(one, cls) else one for one in args]
        return function(*whole, **{key: one.whole() if isinstance(one, cls) else one for key, one in named.items()})


def pack_experts(
    module: nn.Module, q: Mapping[str, Sequence[QTensor[Tensor]]], rule: Rule, static: Mapping[str, Tensor]
) -> PackedExperts:
    """The deployed form of a module of experts, float or prepared; see `Mixes.pack_experts`."""
    stacks, base = stacks_of(module), getattr(module, "base", type(module))
    check_activation(module, rule)
    layer: PackedExperts = become(module, class_of(PackedExperts, base, tuple(stack.name for stack in stacks)))
    for name in ("mode", "calibrating", "frozen", "all_experts"):
        layer.__dict__.pop(name, None)
    remove_buffers(layer, "gate", *ranges_of(rule, stacks))
    remove_parameters(layer, *learned_names(stacks))
    for name, scale in static.items():
        layer.register_buffer(name, scale)
    remove_parameters(layer, *(stack.name for stack in stacks))
    layer.rule, layer.stacks, layer.execution = rule, stacks, EXECUTION
    layer.dtype = next(iter(q.values()))[0].dtype
    put_codes(layer, q)
    return layer


def put_codes(layer: PackedExperts, q: Mapping[str, Sequence[QTensor[Tensor]]]) -> None:
    """Stores the codes and scales of all experts, by projection, in `layer`."""
    for name, experts in q.items():
        for part in experts[0].parts():
            stored = torch.stack([one.parts()[part] for one in experts])
            if part == "codes":
                stored = bit_streams.pack(stored, experts[0].grid.element)
            layer.register_buffer(f"{name}_{part}", stored)


def unpack_experts(module: PackedExperts) -> dict[str, list[QTensor[Tensor]]]:
    """See `Mixes.unpack_experts`."""
    return {
        name: [module.quantized(name, expert) for expert in range(stack.shape[0])]
        for stack in module.stacks
        for name in stack.projections
    }


def buffers_of(module: PackedExperts) -> list[str]:
    """The names of the buffers with codes and scales, those of inputs and outputs included."""
    codes = [f"{name}_{part}" for stack in module.stacks for name in stack.projections for part in PARTS]
    return codes + static_of(module)


def static_of(module: PackedExperts) -> list[str]:
    """The names of the buffers [experts] with static scales of inputs and outputs."""
    return static_names(module.rule, projections_of(module.stacks))


def _grouped(x: Tensor, weight: Decoded, offs: Tensor) -> Tensor:
    """The product of rows of `x` that are sorted by expert, which end at `offs`, with the weight of each."""
    ends = offs.tolist()
    out = x.new_zeros((x.shape[0], weight.shape[2]), dtype=weight.dtype)
    parts = []
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin != end:
            parts.append(x[begin:end].to(weight.dtype) @ weight[expert])
    if ends[-1] < x.shape[0]:
        parts.append(out[ends[-1] :])
    return torch.cat(parts) if parts else out
