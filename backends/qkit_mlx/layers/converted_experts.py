"""Converted experts: stacks of linear layers, called as mlx-lm's `SwitchLinear`, that hold codes and are not trained."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import mlx.core as mx
import numpy as np

from qkit.errors import StageError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Rule
from qkit_mlx.arithmetic import rounding
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
    pieces: Sequence[QTensor[mx.array]], rule: Rule, *, experts: int, bias: mx.array | None = None
) -> "PackedSwitchLinear | PlainSwitchLinear":
    """The frozen stack that holds the codes of `pieces`: those of `experts` experts in order, whole ones in each piece."""
    rows, inputs = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    shape = (rows // experts, inputs)
    execution = choose_gather(rule, device=mx.default_device(), dtype=pieces[0].dtype, shape=shape)
    cls = PlainSwitchLinear if execution.container is None else PackedSwitchLinear
    layer = cls(pieces, rule, execution, experts)
    if bias is not None:
        layer.bias = bias
    layer.freeze()
    return layer


class _SwitchLinear(Float32Scales):
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

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1 or chosen, rows, inputs], indices [..., chosen] -> [..., chosen, rows, outputs]."""
        rule = self.rule
        y = self._multiply(_on_grid(x, rule.activation), indices, sorted_indices)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return _on_grid(y.astype(x.dtype), rule.output)

    def to_lora(self, **_: Any) -> NoReturn:
        """Refuses: mlx-lm would merge its adapter with its own quantizer."""
        refuse_lora(self)

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


class PackedSwitchLinear(_SwitchLinear):
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


class PlainSwitchLinear(_SwitchLinear):
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
        made = [rows[mx.array(part)] @ self._values(int(e)).T for e, part in zip(experts, parts, strict=True)]
        return mx.concatenate(made)[mx.array(np.argsort(order, kind="stable"))].reshape(outputs)

    def _multiply_all(self, rows: mx.array, chosen: mx.array) -> mx.array:
        y = mx.zeros((*rows.shape[:-1], self.output_dims))
        for expert in range(self.num_experts):
            y = mx.where((chosen == expert)[:, None, None], rows @ self._values(expert).T, y)
        return y

    def _values(self, expert: int) -> mx.array:
        return rounding.dequantize(replace(self.unpack(expert), dtype="float32"))


def _on_grid(x: mx.array, grid: Grid | None) -> mx.array:
    return x if grid is None else fake_quantize(x, grid)


def refuse_lora(layer: Any) -> NoReturn:
    """Refuses mlx-lm's adapters, which it adds beside the grid, and merges with a quantizer of its own.

    Raises:
        StageError: always.
    """
    raise StageError(
        f"mlx-lm's LoRA would take experts off the grid {layer.rule.weight}: give it `keys` that leave the experts out"
    )


#: The classes of converted stacks.
CONVERTED_STACKS = (PackedSwitchLinear, PlainSwitchLinear)
