"""Converted layers: MLX's own quantised layers where they hold the grid exactly; where not, layers that decode first.

They compute in fp32 from scales held in fp32, whatever the model is cast to, but for bfloat16 on a GPU (see `_direct`).
Linear layers give back the type of their input, embeddings that of the weight they were made from, or of the last cast.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from qkit.engines.protocol import NOTHING
from qkit.formats.mlx_lm import Container, containers_for
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit.rules import Rule
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.packing import packed_codes, unpacked_codes
from qkit_mlx.arithmetic.ranges import given
from qkit_mlx.layers.containers import Contents, contain, contained
from qkit_mlx.layers.exact import Exact
from qkit_mlx.layers.execution import why_no_kernel

GPU = mx.Device(mx.gpu, 0)
DIRECT_BITS = 4  #: integers up to here may be decoded in bfloat16; see `_direct`

#: Arrays of a converted layer, besides those of its weight.
STORED = (
    *("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("lora_a", "lora_b", "m"),  # of an adapter on it
)


def deploy_linear(
    q: QTensor[mx.array], rule: Rule, *, bias: mx.array | None = None, static: Mapping[str, mx.array] = NOTHING
) -> "DeployedLinear | PackedLinear":
    """The linear layer that holds the codes of `q` [outputs, inputs]; all of it is frozen."""
    container, why_not = _container(q)
    layer = DeployedLinear(q, container, rule) if container else PackedLinear(q, rule, why_not)
    if bias is not None:
        layer.bias = bias
    for name, array in static.items():
        layer[name] = array
    layer.freeze()
    return layer


def deploy_embedding(q: QTensor[mx.array], rule: Rule) -> "DeployedEmbedding | PackedEmbedding":
    """The embedding that holds the codes of `q` [entries, width]; all of it is frozen."""
    container, why_not = _container(q)
    layer = DeployedEmbedding(q, container, rule) if container else PackedEmbedding(q, rule, why_not)
    layer.freeze()
    return layer


def _container(q: QTensor[mx.array]) -> tuple[Container | None, str]:
    """The first of MLX's containers for `q` [outputs, inputs] for which there is a kernel here; or None, and why."""
    why_not = f"MLX has no container for {q.grid}"
    for container in containers_for(q.grid, q.shape[-1]):
        dtype = mx.bfloat16 if _direct(q, container) else mx.float32
        why_not = why_no_kernel(container, dtype, shape=(q.shape[0], q.shape[1]))
        if not why_not:
            return container, ""
    return None, why_not


# Held by MLX


class DeployedLinear(Exact, nn.QuantizedLinear):
    """MLX's quantised linear layer, filled with given codes; on a GPU, where it is `plain`, no more than that.

    Adds what MLX's lacks: the grids of input and output, the power of two of `nvfp4`, and an output of the type that came
    in (MLX's would be float32, the type of the scales).
    """

    def __init__(self, q: QTensor[mx.array], container: Container, rule: Rule) -> None:
        nn.Module.__init__(self)  # not QuantizedLinear's: it would draw a random weight and quantise it
        _hold(self, q, container, rule)

    def __call__(self, x: mx.array) -> mx.array:
        if self.plain and x.size and (self.mode == "affine" or x.dtype == mx.bfloat16) and mx.default_device() == GPU:
            return cast(mx.array, nn.QuantizedLinear.__call__(self, x))
        rule = self.rule
        y = _matmul(self, _on_grid(x, self, rule.activation, "input") if rule.activation else x)
        y = _finish(y, x, self.get("bias"))
        return _on_grid(y, self, rule.output, "output") if rule.output else y

    def retype(self, dtype: DType) -> None:
        """The model was cast: another type than bfloat16 is not MLX's own layer's business."""
        super().retype(dtype)
        self.plain: bool = self.plain and dtype == "bfloat16"

    def qtensor(self) -> QTensor[mx.array]:
        """The codes and scales that went in."""
        return _held(self)


class DeployedEmbedding(Exact, nn.QuantizedEmbedding):
    """MLX's quantised embedding, filled with given codes; values are computed in fp32 and rounded once."""

    def __init__(self, q: QTensor[mx.array], container: Container, rule: Rule) -> None:
        nn.Module.__init__(self)  # not QuantizedEmbedding's: it would draw a random weight and quantise it
        _hold(self, q, container, rule)
        self.num_embeddings, self.dims = q.shape

    def __call__(self, x: mx.array) -> mx.array:
        biases = self.get("biases")
        values = mx.dequantize(
            self["weight"][x],
            scales=cast(mx.array, _wide(self["scales"][x])),
            biases=None if biases is None else _wide(biases[x]),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )
        return rounding.to_dtype(_rescaled(values, self), self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model."""
        return _finish(_matmul(self, x), x, None)

    def qtensor(self) -> QTensor[mx.array]:
        """The codes and scales that went in."""
        return _held(self)


def _hold(layer: Any, q: QTensor[mx.array], container: Container, rule: Rule) -> None:
    contents = contain(q, container)
    layer.direct = _direct(q, container)
    if layer.direct and contents.biases is not None:
        narrow = [array.astype(mx.bfloat16) for array in (contents.scales, contents.biases)]
        contents = replace(contents, scales=narrow[0], biases=narrow[1])
    layer.weight, layer.scales, layer.biases = contents.weight, contents.scales, contents.biases
    layer.group_size, layer.bits, layer.mode = container.group, container.bits, container.mode
    if contents.tensor_scale is not None:
        layer.tensor_scale = contents.tensor_scale
    layer.rule, layer.grid, layer.inputs, layer.dtype = rule, q.grid, q.shape[-1], q.dtype
    layer.plain = layer.direct and not rule.slots and contents.tensor_scale is None
    layer.native = True
    layer.execution = f"{type(layer).__mro__[2].__name__}, {_words(q.grid, container)}"


def _direct(q: QTensor[mx.array], container: Container) -> bool:
    """Whether MLX's GPU kernels may compute with bfloat16 inputs as they are, as they do for MLX's own layers.

    They decode in bfloat16 then. Small floats stay exact. Symmetric integers have exact scales and biases, but code * scale
    rounds before the bias is added: values are off by up to 0.054 of a step at 4 bits (0.027 if rounded once), by 0.98 at 8.
    """
    exact = container.mode != "affine" or (q.grid.symmetric and container.bits <= DIRECT_BITS)
    return exact and q.dtype == "bfloat16" and _on_gpu()


def _on_gpu() -> bool:
    return bool(mx.default_device() == GPU)


def _wide(array: mx.array | None) -> mx.array | None:
    """Scales and biases that were narrowed, in float32 again; exactly."""
    return array.astype(mx.float32) if array is not None and array.dtype == mx.bfloat16 else array


def _held(layer: Any) -> QTensor[mx.array]:
    scales, biases = cast(mx.array, _wide(layer["scales"])), _wide(layer.get("biases"))
    contents = Contents(layer["weight"], scales, biases, layer.get("tensor_scale"))
    return contained(contents, layer.grid, inputs=layer.inputs, dtype=layer.dtype)


def _matmul(layer: Any, x: mx.array) -> mx.array:
    """`x` times the transposed weight, in fp32; in bfloat16 where the layer is `direct`."""
    if not x.size:  # on which MLX's CPU kernels divide by zero and take the process with them (0.32.4)
        return mx.zeros((*x.shape[:-1], len(layer["weight"])))
    scales, biases = layer["scales"], layer.get("biases")
    if not (layer.direct and x.dtype == mx.bfloat16 and _on_gpu()):
        x = x.astype(mx.float32)
        if layer.direct:
            scales, biases = _wide(scales), _wide(biases)
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


def _words(grid: Grid, container: Container) -> str:
    name = f"affine {container.bits}-bit" if container.mode == "affine" else container.mode
    if grid.group == container.group:
        return f"{name} g{container.group}"
    scale = f"{grid.group} scale" if isinstance(grid.group, str) else f"scale of g{grid.group}"
    return f"{name}, {scale} repeated at g{container.group}"


# Decoded first


class PackedLinear(Exact):
    """A linear layer that MLX has no container or no kernel for: holds canonical words, and decodes them at every call."""

    def __init__(self, q: QTensor[mx.array], rule: Rule, why: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _keep(self, q, rule, why)

    def __call__(self, x: mx.array) -> mx.array:
        rule = self.rule
        on_grid = _on_grid(x, self, rule.activation, "input") if rule.activation else x
        y = _finish(on_grid.astype(mx.float32) @ _values(self).T, x, self.get("bias"))
        return _on_grid(y, self, rule.output, "output") if rule.output else y

    def qtensor(self) -> QTensor[mx.array]:
        """The codes and scales that went in."""
        return _kept(self, self["weight"], self["scales"], self.get("zeros"))


class PackedEmbedding(Exact):
    """An embedding that MLX has no container or no kernel for: decodes only the rows that are looked up."""

    def __init__(self, q: QTensor[mx.array], rule: Rule, why: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _keep(self, q, rule, why)

    def __call__(self, x: mx.array) -> mx.array:
        entries = x.flatten()
        scales, zeros = self["scales"], self.get("zeros")
        if self.grid.group != "tensor":
            scales, zeros = scales[entries], None if zeros is None else zeros[entries]
        return rounding.dequantize(_kept(self, self["weight"][entries], scales, zeros)).reshape(*x.shape, self.inputs)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model."""
        return _finish(x.astype(mx.float32) @ _values(self).T, x, None)

    def qtensor(self) -> QTensor[mx.array]:
        """The codes and scales that went in."""
        return _kept(self, self["weight"], self["scales"], self.get("zeros"))


def _keep(layer: Any, q: QTensor[mx.array], rule: Rule, why: str) -> None:
    layer.weight, layer.scales = packed_codes(q.codes, q.grid.element), q.scales
    if q.zeros is not None:
        layer.zeros = q.zeros
    layer.rule, layer.grid, layer.inputs, layer.dtype = rule, q.grid, q.shape[-1], q.dtype
    layer.native = False
    layer.execution = why


def _kept(layer: Any, words: mx.array, scales: mx.array, zeros: mx.array | None) -> QTensor[mx.array]:
    grid = layer.grid
    codes = unpacked_codes(words, element=grid.element, n=layer.inputs, symmetric=grid.symmetric)
    return QTensor(codes, scales, grid, layer.dtype, zeros=zeros)


def _values(layer: Any) -> mx.array:
    return rounding.dequantize(replace(layer.qtensor(), dtype="float32"))


# Both


def _on_grid(x: mx.array, layer: Any, grid: Grid, name: str) -> mx.array:
    """What goes in or comes out, on its grid."""
    return rounding.fake_quantize(x, grid, **given(layer, grid, name=name))


def _finish(y: mx.array, x: mx.array, bias: mx.array | None) -> mx.array:
    """fp32 `y` with the bias, in the type of `x`."""
    y = y if bias is None else y + bias
    return y.astype(x.dtype)


#: What a converted layer can be. Besides its arrays each has `rule`, `grid`, `inputs`, `dtype`, `native`, `execution`.
DEPLOYED = (DeployedLinear, DeployedEmbedding, PackedLinear, PackedEmbedding)
