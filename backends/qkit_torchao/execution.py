"""What multiplies the codes of a converted layer on its device: a kernel of torch's where one fits, else decoding first.

A kernel multiplies codes and applies scales afterwards. On the CPU all layers decode, so that a converted model computes
the same bits as the prepared one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.qtensor import DType, QTensor
from qkit.recipe import Rule
from qkit_torchao import lowering, products
from qkit_torchao.lowering import Container
from qkit_torchao.static import static_scales


@dataclass(frozen=True, slots=True)
class Execution:
    """How a converted layer runs.

    Attributes:
        native: whether a kernel multiplies its codes; else they are decoded at every call.
        text: the kernel; or what decodes, and why no kernel does.
        container: the torchao tensor that holds the codes; None for plain arrays.
        takes_floats: whether `F.linear` takes the container as a weight.
        multiply: the product of a layer and its input; None for `F.linear`.
    """

    native: bool
    text: str
    container: Container | None = None
    takes_floats: bool = False
    multiply: Callable[[Any, Tensor], Tensor] | None = None


def choose(q: QTensor[Tensor], rule: Rule) -> Execution:
    """How a layer with the codes `q` runs on the device where they are."""
    if rule.kind == "embedding":
        return Execution(native=False, text="rows are decoded as they are looked up")
    if lowering.fits_tiles(q):
        return Execution(True, "torchao Int4TilePackedTo4dTensor (tinygemm)", lowering.TILES, takes_floats=True)
    why_not = why_no_kernel(rule, device=q.codes.device, dtype=q.dtype, shape=q.shape)
    if q.grid.element.kind == "integer":
        if not why_not:
            return Execution(True, "torch._int_mm on the codes of both sides", lowering.INTEGER, multiply=_int8)
        return Execution(False, f"in torchao IntxUnpackedToInt8Tensor; {why_not}", lowering.INTEGER, takes_floats=True)
    if q.grid.scale == "nvfp4":
        return Execution(False, f"in torchao NVFP4Tensor; {why_not}", lowering.NVFP4, takes_floats=True)
    if q.grid.element.bits == 8 and q.grid.group in ("row", "tensor"):
        if not why_not:
            return Execution(
                True, "torch._scaled_mm on the codes of both sides", lowering.FLOAT8_ROWS, multiply=_float8
            )
        return Execution(False, f"from torchao Float8Tensor; {why_not}", lowering.FLOAT8_ROWS)
    return Execution(False, f"from plain arrays; {why_not}")


def why_no_kernel(rule: Rule, *, device: torch.device, dtype: DType, shape: tuple[int, ...]) -> str:
    """Why no kernel multiplies codes of weights [outputs, inputs] with those of inputs under `rule`; empty if one does."""
    assert rule.weight is not None
    if device.type != "cuda":
        return f"no kernel on the {device.type} gives the bits of the prepared layer"
    kind = products.kind(rule.weight, rule.activation)
    if not kind:
        inputs = f"times {rule.activation}" if rule.activation else f"and {dtype} inputs"
        return f"{torch.cuda.get_device_name(device)} has no kernel for {rule.weight} {inputs}"
    if kind == "float8" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has no e4m3 products by rows: compute capability 9.0 has"
    if kind == "float8" and dtype != "bfloat16":
        return f"e4m3 products come out in bfloat16, and the model is {dtype}"
    size = products.ALIGNED[kind]
    if all(n % size == 0 for n in shape):
        return ""
    return f"the kernel wants inputs and outputs in multiples of {size}, not {shape[1]} and {shape[0]}"


def _int8(layer: Any, x: Tensor) -> Tensor:
    codes, steps = products.quantized(x, layer.rule.activation, **static_scales(layer, "input", layer.rule.activation))
    return products.finish(products.int8(codes, steps, layer.weight.qdata, layer.weight.scale), x, layer.bias)


def _float8(layer: Any, x: Tensor) -> Tensor:
    codes, steps = products.quantized(x, layer.rule.activation, **static_scales(layer, "input", layer.rule.activation))
    return products.finish(products.float8(codes, steps, layer.weight.qdata, layer.weight.scale), x, layer.bias)
