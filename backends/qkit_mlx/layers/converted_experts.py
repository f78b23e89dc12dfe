"""Converted experts: stacks of linear layers, called as mlx-lm's `SwitchLinear`, that hold codes and are not trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from qkit.element import NVFP4_STEP
from qkit.engines.protocol import NOTHING
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Rule, Ste
from qkit_mlx.arithmetic import ranges, rounding
from qkit_mlx.arithmetic.packing import unpacked_codes
from qkit_mlx.kernels import choose
from qkit_mlx.layers.containers import Contents, contain, contained
from qkit_mlx.layers.execution import GPU, Execution, choose_gather
from qkit_mlx.layers.float32_scales import Float32Scales
from qkit_mlx.layers.straight_through import fake_quantize


def quantize_stack(weight: mx.array, grid: Grid, *, peaks: mx.array | None) -> list[QTensor[mx.array]]:
    """The codes of `weight` [experts, outputs, inputs] in pieces of whole experts, in order, each [rows, inputs].

    No expert sees another. Where codes depend on one row alone, all rows are one piece.

    Args:
        peaks: [experts], `nvfp4` only: the largest magnitude of the weights that share a tensor scale with each of these.
    """
    experts, outputs, inputs = weight.shape
    if grid.by_rows:
        return [choose.quantize(weight.reshape(experts * outputs, inputs), grid)]
    tops = [None] * experts if peaks is None else list(peaks)
    return [choose.quantize(one, grid, peak=top) for one, top in zip(weight, tops, strict=True)]


def pack_stack(
    pieces: Sequence[QTensor[mx.array]],
    rule: Rule,
    *,
    experts: int,
    bias: mx.array | None = None,
    static: Mapping[str, mx.array] = NOTHING,
) -> "PackedSwitchLinear | PlainSwitchLinear":
    """The frozen stack that holds the codes of `pieces`: those of `experts` experts in order, whole ones in each piece.

    Args:
        static: `input_scale` and so on, [experts], where the rule's range is static.
    """
    rows, inputs = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    shape = (rows // experts, inputs)
    execution = choose_gather(rule, device=mx.default_device(), dtype=pieces[0].dtype, shape=shape)
    cls = PlainSwitchLinear if execution.container is None else PackedSwitchLinear
    layer = cls(pieces, rule, execution, experts)
    if bias is not None:
        layer.bias = bias
    for name, array in static.items():
        layer[name] = array
    layer.freeze()
    return layer


class SwitchCodes(Float32Scales):
    """The parts that both converted stacks have. Besides its arrays: `rule`, `grid`, `inputs`, `dtype` and `execution`."""

    def __init__(self, pieces: Sequence[QTensor[mx.array]], rule: Rule, execution: Execution, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        first = pieces[0]
        self.rule, self.grid, self.inputs, self.dtype = rule, first.grid, first.shape[-1], first.dtype
        self.execution = execution
        for name, arrays in self._arrays(pieces).items():
            stacked = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
            self[name] = stacked.reshape(experts, -1, *stacked.shape[1:])
        if first.tensor_scale is not None:
            self.tensor_scale = mx.stack([cast(mx.array, piece.tensor_scale) for piece in pieces])

    def _arrays(self, pieces: Sequence[QTensor[mx.array]]) -> dict[str, list[mx.array]]:
        raise NotImplementedError

    def unpack(self, expert: int) -> QTensor[mx.array]:
        """The codes and scales of one expert, [outputs, inputs]."""
        raise NotImplementedError

    def _multiply(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        raise NotImplementedError

    def peak_of(self, expert: int) -> mx.array:
        """A largest magnitude of one expert that gives its tensor scale again, for a partner that shares it."""
        scale: mx.array = self["tensor_scale"][expert]
        return scale * (0.75 / NVFP4_STEP)  # the scale is a power of two, rounded up

    def values_of(self, expert: int) -> mx.array:
        """The float32 weight of one expert, [outputs, inputs]."""
        return rounding.dequantize(replace(self.unpack(expert), dtype="float32"))

    def multiply_one_by_one(self, x: mx.array, indices: mx.array) -> mx.array:
        """The product, float32, with the weights of the experts that tokens chose, each decoded by itself."""
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:]).astype(mx.float32)
        chosen = indices.flatten()
        outputs = (*indices.shape, x.shape[-2], self.output_dims)
        if not rows.size:
            return mx.zeros(outputs)
        try:
            found = np.array(chosen)
        except ValueError:  # while a function is compiled, nobody knows which experts tokens will choose
            return self._multiply_all(rows, chosen).reshape(outputs)
        order = np.argsort(found, kind="stable")
        experts, starts = np.unique(found[order], return_index=True)
        parts = np.split(order, starts[1:])
        made = [rows[mx.array(part)] @ self.values_of(int(e)).T for e, part in zip(experts, parts, strict=True)]
        return mx.concatenate(made)[mx.array(np.argsort(order, kind="stable"))].reshape(outputs)

    def _multiply_all(self, rows: mx.array, chosen: mx.array) -> mx.array:
        y = mx.zeros((*rows.shape[:-1], self.output_dims))
        for expert in range(self.num_experts):
            y = mx.where((chosen == expert)[:, None, None], rows @ self.values_of(expert).T, y)
        return y

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1 or chosen, rows, inputs], indices [..., chosen] -> [..., chosen, rows, outputs]."""
        rule = self.rule
        y = self._multiply(on_grid(self, x, rule.activation, "input", indices), indices, sorted_indices)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return on_grid(self, y.astype(x.dtype), rule.output, "output", indices)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
        """See `Tunable.to_lora`."""
        from qkit_mlx.layers.adapted_experts import with_lora  # here, since adapted stacks are stacks of this kind

        return with_lora(self, r, dropout, scale)

    @property
    def input_dims(self) -> int:
        """As in mlx-lm's layer."""
        return int(self.inputs)

    @property
    def output_dims(self) -> int:
        """As in mlx-lm's layer."""
        return int(self["weight"].shape[1])

    @property
    def num_experts(self) -> int:
        """As in mlx-lm's layer."""
        return len(self["weight"])


class PackedSwitchLinear(SwitchCodes):
    """A stack in one of MLX's containers: `mx.gather_qmm` multiplies the codes of the experts that tokens chose."""

    def _arrays(self, pieces: Sequence[QTensor[mx.array]]) -> dict[str, list[mx.array]]:
        container = self.execution.container
        assert container is not None
        self.group_size, self.bits, self.mode = container.group, container.bits, container.mode
        parts = [contain(piece, container) for piece in pieces]
        narrow = self.execution.in_bfloat16 and container.mode == "affine"
        out = {"weight": [part.weight for part in parts], "scales": [part.scales for part in parts]}
        if container.mode == "affine":
            out["biases"] = [cast(mx.array, part.biases) for part in parts]
        return {
            name: [array.astype(mx.bfloat16) for array in arrays] if narrow and name != "weight" else arrays
            for name, arrays in out.items()
        }

    def unpack(self, expert: int) -> QTensor[mx.array]:
        """The codes and scales of one expert, [outputs, inputs]."""
        scales, biases = self.stored("scales")[expert], self.stored("biases")[expert] if "biases" in self else None
        tensor_scale = self["tensor_scale"][expert] if "tensor_scale" in self else None
        contents = Contents(self["weight"][expert], scales, biases, tensor_scale)
        return contained(contents, self.grid, inputs=self.inputs, dtype=self.dtype)

    def _multiply(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        if not x.size:
            return mx.zeros((*indices.shape, x.shape[-2], self.output_dims))
        scales, biases = self["scales"], self.get("biases")
        in_bfloat16 = self.execution.in_bfloat16 and x.dtype == mx.bfloat16 and mx.default_device() == GPU
        if not in_bfloat16:
            x, scales, biases = x.astype(mx.float32), self.widened("scales"), self.widened("biases")
        y = mx.gather_qmm(
            x,
            self["weight"],
            scales,
            biases,
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )
        return y * self["tensor_scale"][indices][..., None, None] if "tensor_scale" in self else y


class PlainSwitchLinear(SwitchCodes):
    """A stack that MLX has no container or no kernel for: decodes one expert at a time, and those alone that tokens chose."""

    def _arrays(self, pieces: Sequence[QTensor[mx.array]]) -> dict[str, list[mx.array]]:
        out = {
            "weight": [choose.packed_codes(piece.codes, piece.grid.element) for piece in pieces],
            "scales": [piece.scales for piece in pieces],
        }
        for name in ("zeros", "biases"):
            if found := [piece.parts()[name] for piece in pieces if name in piece.parts()]:
                out[name] = found
        return out

    def unpack(self, expert: int) -> QTensor[mx.array]:
        """The codes and scales of one expert, [outputs, inputs]."""
        parts = {name: self[name][expert] for name in ("scales", "zeros", "biases", "tensor_scale") if name in self}
        element, symmetric = self.grid.element, self.grid.symmetric
        codes = unpacked_codes(self["weight"][expert], element=element, n=self.inputs, symmetric=symmetric)
        return QTensor(codes, grid=self.grid, dtype=self.dtype, **parts)

    def _multiply(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        return self.multiply_one_by_one(x, indices)


def on_grid(
    stored: Mapping[str, mx.array],
    x: mx.array,
    grid: Grid | None,
    name: str,
    indices: mx.array,
    ste: Ste = "identity",
) -> mx.array:
    """x [..., 1 or chosen, rows, n] of the experts `indices` [..., chosen] on the grid of `name`, `input` or `output`.

    Args:
        stored: the static scales `input_scale` [experts] and so on; without them they follow from `x`.
    """
    if grid is None or not x.size:
        return x
    if f"{name}_scale" not in stored:
        return fake_quantize(x, grid, ste=ste)
    x = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
    each = {
        key: stored[key][indices][..., None, None] for key in (f"{name}_scale", f"{name}_zero_point") if key in stored
    }
    each = {key: mx.broadcast_to(one, (*x.shape[:-1], 1)) for key, one in each.items()}
    return fake_quantize(x, ranges.by_rows(grid), ste=ste, **ranges.stored_scales(each, grid, name=name))


#: The classes of converted stacks.
CONVERTED_STACKS = (PackedSwitchLinear, PlainSwitchLinear)
