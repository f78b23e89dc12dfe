"""How a converted layer multiplies its codes on its device: by kernels of ours or of torch's where they fit, else decoded.

Codes are packed without gaps where there are kernels; few rows are multiplied by them, more by their values, which one pass
decodes. On CUDA, where both sides are int8 or e4m3, codes are multiplied, and scales applied afterwards. On the CPU more than one
token, and everywhere all of them within `qkit.exact()`, are multiplied by values, and have the bits of the prepared model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.qtensor import DType, dtype_of
from qkit.rules import Rule
from qkit_torchao.arithmetic.packing import Layout
from qkit_torchao.kernels import choose
from qkit_torchao.layers import containers, products
from qkit_torchao.layers.containers import Container
from qkit_torchao.layers.packed_product import decode_packed, multiply_packed
from qkit_torchao.layers.shared_codes import coded_input
from qkit_torchao.layers.slots import slot, static_scales
from qkit_torchao.torch_private import is_transformed

CACHED = 256  #: the most choices that are cached


@dataclass(frozen=True, slots=True)
class Execution:
    """How a converted layer runs.

    Attributes:
        native: whether a kernel multiplies its codes; else they are decoded at every call.
        text: the kernel; or how codes are decoded, and why no kernel multiplies them.
        layout: how the codes lie in memory.
        container: the torchao tensor of the codes; None for plain arrays.
        takes_floats: whether `F.linear` takes the container as a weight.
        multiply: the product of a layer and its input; None for `F.linear`.
        both: whether that product is one of codes of both sides.
    """

    native: bool
    text: str
    layout: Layout
    container: Container | None = None
    takes_floats: bool = False
    multiply: Callable[[Any, Tensor], Tensor] | None = None
    both: bool = False


@lru_cache(maxsize=CACHED)
def choose_execution(rule: Rule, *, device: torch.device, dtype: DType, shape: tuple[int, ...]) -> Execution:
    """How a converted layer under `rule`, with a weight of `shape`, runs on `device`."""
    grid = rule.weight
    assert grid is not None
    packs = choose.packs(grid, device)
    if grid.read and rule.kind != "embedding":
        return _packed(grid, shape[1], device) if packs else _decoded_by_torch(device)
    if rule.kind == "embedding":
        text = "rows are decoded as they are looked up"
        return Execution(False, text, "words") if packs or grid.read else _plain(text, grid)
    why_not = why_no_kernel(rule, device=device, dtype=dtype, shape=shape)
    if not why_not and grid.element.kind == "integer":
        kernel = "torch._int_mm" if choose.why_no_triton(device) else "a Triton kernel"
        text = f"{kernel} on the codes of both sides"
        return _in_container(text, containers.INTEGER, native=True, multiply=_int8, both=True)
    if not why_not:
        kernel = "torch._scaled_mm on the codes of both sides"
        return _in_container(kernel, containers.FLOAT8_ROWS, native=True, multiply=_float8, both=True)
    if packs:
        return _packed(grid, shape[1], device)
    if grid.element.name in containers.INTEGER.elements:
        return _in_container(f"in torchao IntxUnpackedToInt8Tensor; {why_not}", containers.INTEGER, takes_floats=True)
    if grid.scale == "nvfp4":
        return _in_container(f"in torchao NVFP4Tensor; {why_not}", containers.NVFP4, takes_floats=True)
    if grid.element.name in containers.FLOAT8_ROWS.elements and grid.group in ("row", "tensor"):
        return _in_container(f"from torchao Float8Tensor; {why_not}", containers.FLOAT8_ROWS)
    return _plain(f"from plain arrays; {why_not}", grid)


def _packed(grid: Grid, inputs: int, device: torch.device) -> Execution:
    """Codes without gaps, for kernels of ours."""
    on_cpu = device.type == "cpu"
    if why_not := choose.why_not_few(grid, inputs, device):
        kernel, then = ("a C kernel", "torch's product") if on_cpu else ("a Triton kernel", "cuBLAS")
        return Execution(
            False, f"by one pass of {kernel} over packed codes, then {then}; {why_not}", "words", multiply=_words
        )
    text = "CUDA kernels on packed codes: products of up to 64 rows; for more, one pass decodes for cuBLAS"
    if on_cpu:
        text = "C kernels on packed codes: products of one token; for more, and in qkit.exact(), one pass decodes for torch"
    return Execution(True, text, "words", multiply=_words)


def _decoded_by_torch(device: torch.device) -> Execution:
    return Execution(False, f"by torch from packed codes; {choose.why_not_packed(device)}", "words")


def _in_container(text: str, container: Container, *, native: bool = False, **how: Any) -> Execution:
    return Execution(native, text, container.layout, container, **how)


def _plain(text: str, grid: Grid) -> Execution:
    """Codes in plain arrays, two to a byte where they have four bits and rows are of even width."""
    even = isinstance(grid.group, int) and grid.group % 2 == 0
    return Execution(False, text, "pairs" if grid.element.name == "e2m1" and even else "bytes")


def why_no_kernel(rule: Rule, *, device: torch.device, dtype: DType, shape: tuple[int, ...]) -> str:
    """Why no kernel multiplies codes of weights [outputs, inputs] with those of inputs under `rule`; empty if one does."""
    assert rule.weight is not None
    if device.type != "cuda":
        if why_not := choose.why_not_packed(device):
            return why_not
        return f"no kernel on the {device.type} gives the bits of the prepared layer"
    kind = products.kind(rule.weight, rule.activation)
    if not kind:
        inputs = f"times {rule.activation}" if rule.activation else f"and {dtype} inputs"
        return choose.why_not_packed(device) or f"torch has no kernel for {rule.weight} {inputs}"
    if kind == "float8" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has no e4m3 products by rows: compute capability 9.0 has"
    if kind == "float8" and dtype != "bfloat16":
        return f"e4m3 products come out in bfloat16, and the model is {dtype}"
    size = products.ALIGNED[kind]
    if all(n % size == 0 for n in shape):
        return ""
    return f"the kernel wants inputs and outputs in multiples of {size}, not {shape[1]} and {shape[0]}"


def fits_kernel(layer: Any, x: Tensor) -> bool:
    """Whether a kernel multiplies the codes of a prepared layer with those of `x`; eager code looks it up in `layer.fits`."""
    key, compiles = (x.device, x.dtype), torch.compiler.is_compiling()
    known: bool | None = None if compiles else layer.fits.get(key)
    if known is None:
        shape = (layer.out_features, layer.in_features)
        known = not why_no_kernel(layer.rule, device=x.device, dtype=dtype_of(x), shape=shape)
        if not compiles:
            layer.fits[key] = known
    return known


def _int8(layer: Any, x: Tensor) -> Tensor:
    y = products.int8(_codes_of(layer, x), layer.weight.qdata, layer.weight.scale, layer.bias, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _float8(layer: Any, x: Tensor) -> Tensor:
    y = products.float8(_codes_of(layer, x), layer.weight.qdata, layer.weight.scale, layer.bias, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _codes_of(layer: Any, x: Tensor) -> products.Rows:
    activation = layer.rule.activation
    return coded_input(x, activation, taker=layer, **static_scales(layer, "input", activation))


def _words(layer: Any, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and is_transformed():  # which see into products of torch's alone
        values = decode_packed(layer.parts(), layer.grid_name, layer.in_features, x.dtype)
        return F.linear(slot(layer, x, "input", layer.rule.activation), values, layer.bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x = slot(layer, x, "input", layer.rule.activation)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return multiply_packed(x, layer.parts(), bias, layer.grid_name)
