"""Converted experts: packed codes, decoded expert by expert as they are used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkit.expert_inputs import static_names
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.rules import Rule
from qkit_torchao.arithmetic import bit_streams, rounding, words
from qkit_torchao.arithmetic.packing import Laid, lay, unlay
from qkit_torchao.kernels import choose
from qkit_torchao.layers import straight_through
from qkit_torchao.layers.become import apply_but_keep, become
from qkit_torchao.layers.decoded_experts import Decoded
from qkit_torchao.layers.execution import Execution
from qkit_torchao.layers.expert_inputs import OneExpert, check_activation, projections_of, ranges_of
from qkit_torchao.layers.experts import Experts, class_of
from qkit_torchao.layers.learned_experts import learned_names
from qkit_torchao.layers.slots import static_scales
from qkit_torchao.layers.stacks import Stack, stacks_of
from qkit_torchao.torch_private import remove_buffers, remove_parameters

FEW = 4  #: rows for each expert of a block, on average, up to which codes are multiplied: more pay for the values
PARTS = ("codes", "scales", "zeros", "tensor_scale", "biases")
DECODED = Execution(native=False, text="expert by expert, as tokens reach them", layout="bytes")
MULTIPLIED = Execution(native=True, text="codes of few tokens multiplied; else expert by expert", layout="words")


class PackedExperts(Experts):
    """Experts of packed codes. Their weights are `Decoded`, which transformers' implementations of experts use as tensors."""

    dtype: DType
    execution: Execution
    in_words: bool  #: whether codes lie in the layout `words`, which kernels read; else in canonical words

    def values_of(self, stack: Stack) -> Any:
        """The weights of `stack`; compiled code decodes all of them."""
        decoded = Decoded(self, stack)
        return decoded.whole() if torch.compiler.is_compiling() else decoded

    @property
    def grid(self) -> Grid:
        """The grid of the weights."""
        grid = self.rule.weight
        assert grid is not None
        return grid

    def stored(self, projection: str) -> dict[str, Tensor]:
        """The codes and scales of a projection of all experts, by the names of `PARTS`."""
        return {name: self.get_buffer(f"{projection}_{name}") for name in self._parts(self.grid)}

    def quantized(self, projection: str, expert: int) -> QTensor[Tensor]:
        """The codes and scales of one expert's projection, [outputs, inputs]."""
        grid, parts = self.grid, {name: one[expert] for name, one in self.stored(projection).items()}
        _, outputs, inputs = next(stack.shape for stack in self.stacks if projection in stack.projections)
        if self.in_words:
            more = {name: parts.get(name) for name in ("zeros", "tensor_scale", "biases")}
            laid = Laid(parts["codes"], parts["scales"], grid=grid, dtype=self.dtype, shape=(outputs, inputs), **more)
            return unlay(laid)
        parts["codes"] = bit_streams.unpack(parts["codes"], grid.element, inputs, symmetric=grid.symmetric)
        return QTensor(grid=grid, dtype=self.dtype, **parts)

    def decoded(self, stack: Stack, expert: int) -> Tensor:
        """The weight of one expert, laid out as in the parameter of `stack`."""
        with torch.no_grad():
            return stack.join(self._values(name, expert, stack.shape[2]) for name in stack.projections)

    def multiplies(self, x: Tensor, stack: Stack) -> bool:
        """Whether `multiply_rows` takes x [rows, inputs]: few rows for each expert, on a device whose kernels multiply codes."""
        few = 0 < len(x) <= FEW * stack.shape[0]
        return few and self.adapter == "" and self.in_words and choose.multiplies_experts(x, self.grid)

    def multiply_rows(self, x: Tensor, stack: Stack, experts: Tensor) -> Tensor:
        """x [rows, inputs] times the codes of the expert of each row -> [rows, outputs of all projections]."""
        made = []
        for name in stack.projections:
            parts = self.stored(name)
            power, of_kernel = parts.get("tensor_scale"), None
            if self.grid.read:  # whose steps a float32 that is no power of two rounds
                power, of_kernel = None, power
            more = parts.get("zeros"), of_kernel, parts.get("biases"), None
            y = choose.multiply(x, parts["codes"], parts["scales"], *more, self.grid, experts=experts)
            made.append(y if power is None else y * power[experts, None].to(y.dtype))
        return stack.join_products(made)

    def _values(self, projection: str, expert: int, inputs: int) -> Tensor:
        codes = self.get_buffer(f"{projection}_codes")
        if not self.in_words or not choose.packs(self.grid, codes.device):
            return choose.dequantize(self.quantized(projection, expert))
        parts = {name: one[expert] for name, one in self.stored(projection).items()}
        named = (parts.get(name) for name in PARTS[1:])
        dtype = rounding.DTYPE[self.dtype]
        return choose.values(parts["codes"], *named, self.grid, inputs=inputs, dtype=dtype)

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
    layer.rule, layer.stacks = rule, stacks
    layer.dtype = next(iter(q.values()))[0].dtype
    put_codes(layer, q)
    return layer


def put_codes(layer: PackedExperts, q: Mapping[str, Sequence[QTensor[Tensor]]]) -> None:
    """Stores the codes and scales of all experts, by projection, in `layer`: in words, where kernels of the device read these."""
    grid, first = layer.grid, next(iter(q.values()))[0]
    fits = (
        choose.packs(grid, first.codes.device),
        *(_fits(grid, each[0].shape[-1]) for each in q.values()),
    )
    layer.in_words = in_words = all(fits)
    few = in_words and all(choose.multiplies_experts(each[0].codes, grid) for each in q.values())
    layer.execution = MULTIPLIED if few else DECODED
    for name, experts in q.items():
        laid = [lay(one, "words") for one in experts] if in_words else experts
        for part in experts[0].parts():
            arrays = [getattr(one, part) for one in laid]
            if len({one.dtype for one in arrays}) > 1:  # scales that bfloat16 holds, beside others
                arrays = [one.float() for one in arrays]
            stored = torch.stack(arrays)
            if part == "codes" and not in_words:
                stored = bit_streams.pack(stored, grid.element)
            layer.register_buffer(f"{name}_{part}", stored)


def _fits(grid: Grid, inputs: int) -> bool:
    """Whether rows of `inputs` codes are whole units of words, each of one group."""
    return words.has_one_scale(grid, inputs) and inputs % words.unit(grid, inputs) == 0


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
