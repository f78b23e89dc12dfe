"""What multiplies the codes of a converted layer on its device: a kernel of torch's where one fits, else decoding first.

A kernel multiplies codes and applies scales afterwards. On the CPU all layers decode, so that a converted model computes
the same bits as the prepared one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.recipe import Rule
from qkit_torchao import lowering, ops
from qkit_torchao.lowering import Container
from qkit_torchao.static import static_scales

INT8_ROWS = 32  #: `torch._int_mm` wants more than 16 rows
ALIGNED = {"int8": 8, "float8": 16}  #: what inputs and outputs must be a multiple of


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
    why_not = _why_not(q, rule)
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


def _why_not(q: QTensor[Tensor], rule: Rule) -> str:
    """Why no kernel multiplies the codes of `q` with those of its input; empty if one does."""
    device, grids = q.codes.device, (q.grid, rule.activation)
    if device.type != "cuda":
        return f"no kernel on the {device.type} gives the bits of the prepared layer"
    name = torch.cuda.get_device_name(device)
    if rule.activation is None:
        return f"{name} has no kernel for {q.grid} and float inputs" + (" in float32" if q.dtype == "float32" else "")
    kind = "int8" if all(grid and grid.element.kind == "integer" for grid in grids) else "float8"
    whole = all(grid and grid.group in ("row", "tensor") for grid in grids)
    if kind == "int8" and whole and q.grid.symmetric:
        return _misaligned(q, ALIGNED["int8"])
    if kind == "float8" and whole and all(grid and grid.element.name == "e4m3" for grid in grids):
        if torch.cuda.get_device_capability(device) < (9, 0):
            return f"{name} has no e4m3 products by rows: compute capability 9.0 has"
        if q.dtype != "bfloat16":
            return f"e4m3 products come out in bfloat16, and the model is {q.dtype}"
        return _misaligned(q, ALIGNED["float8"])
    return f"{name} has no kernel for {q.grid} times {rule.activation}"


def _misaligned(q: QTensor[Tensor], size: int) -> str:
    fits = all(n % size == 0 for n in q.shape)
    return (
        "" if fits else f"the kernel wants inputs and outputs in multiples of {size}, not {q.shape[1]} and {q.shape[0]}"
    )


def _int8(layer: Any, x: Tensor) -> Tensor:
    """int8 by integer codes: their product in int32 is exact; scales are applied to it in fp32, and the bias, then one cast."""
    codes, scale, zero = _codes(layer, x)
    weight = layer.weight.qdata
    padded = torch.nn.functional.pad(codes, (0, 0, 0, max(0, INT8_ROWS - len(codes))))
    product = torch._int_mm(padded, weight.T)[: len(codes)]
    if zero is not None:
        product = product - zero.to(torch.int32) * weight.sum(dim=1, dtype=torch.int32)
    y = product.to(torch.float32) * scale * layer.weight.scale.reshape(1, -1)
    return _finish(layer, x, y)


def _float8(layer: Any, x: Tensor) -> Tensor:
    """e4m3 by e4m3 on the tensor cores; out in bfloat16."""
    codes, scale, _ = _codes(layer, x)
    weight = layer.weight.qdata
    by_rows = scale.expand(len(codes), 1).contiguous()
    by_columns = layer.weight.scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    y = torch._scaled_mm(codes, weight.T, by_rows, by_columns, out_dtype=torch.bfloat16, use_fast_accum=False)
    return _finish(layer, x, y)


def _codes(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The input as rows of codes (int8 or e4m3) [rows, inputs], its fp32 scales and int8 zero points [rows or 1, 1]."""
    grid: Grid = layer.rule.activation
    rows = x.reshape(-1, x.shape[-1])
    given = static_scales(layer, "input", grid)
    q = ops.quantize_static(rows, grid, **given) if given else ops.quantize(rows, grid)
    scale = ops.scale_values(q).reshape(-1, 1)
    if grid.element.kind == "float":
        return q.codes.view(ops.FLOAT8[grid.element.name]), scale, None
    if q.zeros is None:
        return q.codes, scale, None
    return lowering.shift(q.codes, grid.element), scale, lowering.shift(q.zeros, grid.element).reshape(-1, 1)


def _finish(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """The bias added; NaN in the rows of `y` where `x` is not finite, since codes hold no NaN; shaped and typed like `x`."""
    rows = x.reshape(-1, x.shape[-1])
    y = y + ops.poison(rows.abs().amax(dim=-1, keepdim=True).to(torch.float32))
    y = y if layer.bias is None else y + layer.bias
    return y.to(x.dtype).reshape(*x.shape[:-1], len(layer.weight))
