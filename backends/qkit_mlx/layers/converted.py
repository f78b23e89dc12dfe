"""Converted layers: they hold codes, in one of MLX's containers or in plain arrays, and are not trained.

They compute in fp32 from fp32 scales, whatever the model is cast to, except in bfloat16 on a GPU (see `Execution.in_bfloat16`).
Linear layers return the type of their input. Embeddings return the type of their weight, or of the last cast.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from qkit.engines.protocol import NOTHING
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit.rules import Rule
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.packing import unpacked_codes
from qkit_mlx.arithmetic.ranges import stored_scales
from qkit_mlx.kernels import choose
from qkit_mlx.layers.containers import Contents, contain, contained
from qkit_mlx.layers.execution import GPU, Execution, choose_execution
from qkit_mlx.layers.float32_scales import Float32Scales
from qkit_mlx.layers.straight_through import fake_quantize
from qkit_mlx.layers.tunable import Tunable

PER_GROUP = ("scales", "zeros", "biases")  #: arrays of a `QTensor` that have a number for each group
#: Arrays of a converted layer, besides those of its weight.
STORED = (
    *("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("lora_a", "lora_b", "m", "lora_gains"),  # of an adapter
)


def pack_linear(
    q: QTensor[mx.array], rule: Rule, *, bias: mx.array | None = None, static: Mapping[str, mx.array] = NOTHING
) -> "PackedLinear | PlainLinear":
    """The frozen linear layer that holds the codes of `q` [outputs, inputs]."""
    execution = choose_execution(rule, device=mx.default_device(), dtype=q.dtype, shape=q.shape)
    layer = PlainLinear(q, rule, execution) if execution.container is None else PackedLinear(q, rule, execution)
    if bias is not None:
        layer.bias = bias
    for name, array in static.items():
        layer[name] = array
    layer.freeze()
    return layer


def pack_embedding(q: QTensor[mx.array], rule: Rule) -> "PackedEmbedding | PlainEmbedding":
    """The frozen embedding that holds the codes of `q` [entries, width]."""
    execution = choose_execution(rule, device=mx.default_device(), dtype=q.dtype, shape=q.shape)
    layer = PlainEmbedding(q, rule, execution) if execution.container is None else PackedEmbedding(q, rule, execution)
    layer.freeze()
    return layer


def unpack(layer: Any) -> QTensor[mx.array]:
    """The codes and scales of a converted layer."""
    if isinstance(layer, (PackedLinear, PackedEmbedding)):
        contents = Contents(layer["weight"], layer.stored("scales"), layer.stored("biases"), layer.get("tensor_scale"))
        return contained(contents, layer.grid, inputs=layer.inputs, dtype=layer.dtype)
    return _plain_qtensor(layer, layer["weight"], {name: layer[name] for name in PER_GROUP if name in layer})


# In MLX's containers


class PackedLinear(Tunable, Float32Scales, nn.QuantizedLinear):
    """MLX's quantized linear layer with the codes of `q`. On a GPU, if it is `mlx_only`, MLX's own code computes all of it.

    Adds the parts that MLX's layer lacks: the grids of input and output, the power of two of `nvfp4`, and an output of the type
    of the input. MLX's output would be float32, the type of the scales.
    """

    def __init__(self, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
        nn.Module.__init__(self)  # not QuantizedLinear's, which draws and quantizes a random weight
        _put_in_container(self, q, rule, execution)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        fits = self.mode == "affine" or x.dtype == mx.bfloat16
        if self.mlx_only and x.size and fits and mx.default_device() == GPU:
            return cast(mx.array, nn.QuantizedLinear.__call__(self, x))
        rule = self.rule
        y = _multiply(self, _on_grid(x, self, rule.activation, "input") if rule.activation else x)
        y = _finish(y, x, self.get("bias"))
        return _on_grid(y, self, rule.output, "output") if rule.output else y

    def change_dtype(self, dtype: DType) -> None:
        """See `Float32Scales`. MLX's own layer is right for bfloat16 only."""
        super().change_dtype(dtype)
        self.mlx_only: bool = self.mlx_only and dtype == "bfloat16"


class PackedEmbedding(Float32Scales, nn.QuantizedEmbedding):
    """MLX's quantized embedding with the codes of `q`; computes values in fp32 and rounds them once."""

    def __init__(self, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
        nn.Module.__init__(self)  # not QuantizedEmbedding's, which draws and quantizes a random weight
        _put_in_container(self, q, rule, execution)
        self.num_embeddings, self.dims = q.shape

    def __call__(self, x: mx.array) -> mx.array:
        """Row numbers x [...] -> [..., width]."""
        biases = self.get("biases")
        values = mx.dequantize(
            self["weight"][x],
            scales=_wide(self["scales"][x]),
            biases=None if biases is None else _wide(biases[x]),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )
        return rounding.to_dtype(_rescaled(values, self), self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""
        return _finish(_multiply(self, x), x, None)


def _wide(array: mx.array) -> mx.array:
    """Floats in float32, and codes of scales as they are."""
    return array if array.dtype == mx.uint8 else array.astype(mx.float32)


def _put_in_container(layer: Any, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
    container = execution.container
    assert container is not None
    contents = contain(q, container)
    if execution.in_bfloat16 and contents.biases is not None:
        narrow = [array.astype(mx.bfloat16) for array in (contents.scales, contents.biases)]
        contents = replace(contents, scales=narrow[0], biases=narrow[1])
    layer.weight, layer.scales, layer.biases = contents.weight, contents.scales, contents.biases
    layer.group_size, layer.bits, layer.mode = container.group, container.bits, container.mode
    if contents.tensor_scale is not None:
        layer.tensor_scale = contents.tensor_scale
    layer.rule, layer.grid, layer.inputs, layer.dtype = rule, q.grid, q.shape[-1], q.dtype
    layer.execution = execution
    layer.mlx_only = execution.in_bfloat16 and not rule.slots and contents.tensor_scale is None


def _multiply(layer: Any, x: mx.array) -> mx.array:
    """`x` times the transposed weight: in bfloat16 where the execution says so, else in fp32."""
    if not x.size:  # MLX's CPU kernels divide by zero there, which ends the process (0.32.4)
        return mx.zeros((*x.shape[:-1], len(layer["weight"])))
    scales, biases = layer["scales"], layer.get("biases")
    in_bfloat16 = layer.execution.in_bfloat16
    if not (in_bfloat16 and x.dtype == mx.bfloat16 and mx.default_device() == GPU):
        x = x.astype(mx.float32)
        scales, biases = layer.widened("scales"), layer.widened("biases")
    y = mx.quantized_matmul(
        x,
        layer["weight"],
        scales=scales,
        biases=biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
    return _rescaled(y, layer)


def _rescaled(y: mx.array, layer: Any) -> mx.array:
    tensor_scale: mx.array | None = layer.get("tensor_scale")
    return y if tensor_scale is None else y * tensor_scale


# In plain arrays


class PlainLinear(Tunable, Float32Scales):
    """A linear layer that MLX has no container or no kernel for: every call decodes its packed words."""

    def __init__(self, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _put_in_arrays(self, q, rule, execution)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        rule = self.rule
        on_grid = _on_grid(x, self, rule.activation, "input") if rule.activation else x
        y = _finish(on_grid.astype(mx.float32) @ _values(self).T, x, self.get("bias"))
        return _on_grid(y, self, rule.output, "output") if rule.output else y


class PlainEmbedding(Float32Scales):
    """An embedding that MLX has no container or no kernel for: a call decodes only the rows that it looks up."""

    def __init__(self, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _put_in_arrays(self, q, rule, execution)

    def __call__(self, x: mx.array) -> mx.array:
        """Row numbers x [...] -> [..., width]."""
        rows = x.flatten()
        parts = {name: self[name] for name in PER_GROUP if name in self}
        if self.grid.group != "tensor":
            parts = {name: array[rows] for name, array in parts.items()}
        q = _plain_qtensor(self, self["weight"][rows], parts)
        return rounding.dequantize(q).reshape(*x.shape, self.inputs)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""
        return _finish(x.astype(mx.float32) @ _values(self).T, x, None)


def _put_in_arrays(layer: Any, q: QTensor[mx.array], rule: Rule, execution: Execution) -> None:
    layer.weight, layer.scales = choose.packed_codes(q.codes, q.grid.element), q.scales
    if q.zeros is not None:
        layer.zeros = q.zeros
    if q.biases is not None:
        layer.biases = q.biases
    if q.tensor_scale is not None:
        layer.tensor_scale = q.tensor_scale
    layer.rule, layer.grid, layer.inputs, layer.dtype = rule, q.grid, q.shape[-1], q.dtype
    layer.execution = execution


def _plain_qtensor(layer: Any, weight: mx.array, parts: Mapping[str, mx.array]) -> QTensor[mx.array]:
    grid = layer.grid
    codes = unpacked_codes(weight, element=grid.element, n=layer.inputs, symmetric=grid.symmetric)
    return QTensor(codes, grid=grid, dtype=layer.dtype, tensor_scale=layer.get("tensor_scale"), **parts)


def _values(layer: Any) -> mx.array:
    return rounding.dequantize(replace(unpack(layer), dtype="float32"))


# Both


def _on_grid(x: mx.array, layer: Any, grid: Grid, name: str) -> mx.array:
    """The input or output `x` on its grid."""
    return fake_quantize(x, grid, **stored_scales(layer, grid, name=name))


def _finish(y: mx.array, x: mx.array, bias: mx.array | None) -> mx.array:
    """fp32 `y` plus the bias, in the type of `x`."""
    y = y if bias is None else y + bias
    return y.astype(x.dtype)


#: The classes of converted layers. Besides its arrays, each has `rule`, `grid`, `inputs`, `dtype` and `execution`.
CONVERTED = (PackedLinear, PackedEmbedding, PlainLinear, PlainEmbedding)
