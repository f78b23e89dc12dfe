"""The one dispatcher of kernels: a kernel where one takes the tensor and its grid, else `arithmetic`; the same bits. No autograd.

Each module of kernels declares, as `TAKES`, the pairs of element and scale rule that its kernels compute.
"""

import os
from functools import cache
from importlib.util import find_spec
from itertools import compress
from shutil import which
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkit import native
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao.arithmetic import rounding, words
from qkit_torchao.arithmetic.packing import Laid, Layout
from qkit_torchao.arithmetic.scale_rules import amax, poison
from qkit_torchao.kernels import cpu, cpu_words

COMPILERS = ("gcc", "clang")  #: that Triton looks for, besides the one that CC names
CAPABILITY = (8, 0)  #: the least of GPUs whose kernels read and write bfloat16


def rounded(w: Tensor, grid: Grid, *, peak: Tensor | None = None) -> Tensor:
    """`rounding.rounded(w, grid, peak=peak)`."""
    kernels = _kernels(w)
    if kernels and kernels.takes(w, grid):
        values: Tensor = kernels.values(w, grid, peak=peak)
        return values
    return rounding.rounded(w, grid, peak=peak)


def gated(x: Tensor, grid: Grid, gate: Tensor) -> Tensor:
    """`rounded(x, grid)` where `gate` is on, else `x`; always in new memory."""
    kernels = _kernels(x)
    if kernels and kernels.takes(x, grid):
        values: Tensor = kernels.values(x, grid, gate=gate)
        return values
    return torch.where(gate, rounding.rounded(x, grid), x) if x.numel() else x.clone()


def quantize(
    w: Tensor,
    grid: Grid,
    *,
    values: Tensor | None = None,
    steps: Tensor | None = None,
    peak: Tensor | None = None,
) -> QTensor[Tensor]:
    """`rounding.quantize(w, grid, peak=peak)`. Fills besides, where they are not None:

    Args:
        values: shaped like `w`: the values of the codes.
        steps: float32, shaped like the scales: the factors of the codes; NaN where the group is not finite.
    """
    kernels = _kernels(w)
    if kernels and kernels.takes(w, grid):
        quantized: QTensor[Tensor] = kernels.quantize(w, grid, values=values, steps=steps, peak=peak)
        return quantized
    q = rounding.quantize(w, grid, peak=peak)
    if values is not None:
        values.copy_(rounding.rounded(w, grid, peak=peak))
    if steps is not None:
        steps.copy_(rounding.scale_values(q) + poison(amax(rounding.group(w, grid))))
    return q


def row_codes(x: Tensor, grid: Grid, *, values: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """See `cuda.row_codes`; None where no kernel on a GPU takes `x`, or `values`, which are shaped like it."""
    kernels = on_gpu(x) if grid.group == "row" else None
    if kernels is None or not kernels.quantizes_together(x, grid):
        return None
    found: tuple[Tensor, Tensor] = kernels.row_codes(x, grid, values=values)
    return found


def quantize_into(weights: list[Tensor], targets: list[tuple[QTensor[Tensor], Tensor]]) -> None:
    """Overwrites each of `targets`, codes and steps as `quantize` makes them, with those of its weight.

    Weights are of one type and on one device, and their codes on one grid. One launch, where kernels on a GPU take all of them.
    """
    grid, kernels = targets[0][0].grid, _kernels(weights[0])
    if weights[0].is_cuda and kernels and all(kernels.quantizes_together(w, grid) for w in weights):
        kernels.quantize_into(weights, targets, grid)
        return
    for w, (q, steps) in zip(weights, targets, strict=True):
        for old, new in zip(q.parts().values(), quantize(w, grid, steps=steps).parts().values(), strict=True):
            old.copy_(new)


def lays_out(w: Tensor, grid: Grid) -> bool:
    """Whether kernels write the codes of `w` in the layout of a converted layer: on a GPU."""
    kernels = _kernels(w)
    return w.is_cuda and kernels is not None and kernels.takes(w, grid)


def laid_out(w: Tensor, grid: Grid, layout: Layout, *, broken: Tensor, number: int) -> Laid:
    """See `cuda.laid_out`; for tensors that `lays_out` accepts, in any layout."""
    plain: Layout = "bytes" if layout == "words" else layout
    laid: Laid = _cuda().laid_out(w, grid, plain, broken=broken, number=number)
    if layout == "words":
        from qkit_torchao.kernels import cuda_words

        return cuda_words.laid(laid)
    return laid


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """`rounding.dequantize(q)`."""
    kernels = _kernels(q.codes)
    if kernels and kernels.decodes(q):
        values: Tensor = kernels.dequantize(q)
        return values
    return rounding.dequantize(q)


def why_not_packed(device: torch.device) -> str:
    """Why no kernel on `device` multiplies or decodes packed codes, and the way out; empty where kernels do."""
    if device.type == "cpu":
        return "" if cpu.available() else "qkit's C kernels were not built: install a C compiler, and qkit again"
    if device.type != "cuda":
        return f"there are no kernels for packed codes on the {device.type}"
    return why_no_triton(device)


def packs(grid: Grid, device: torch.device) -> bool:
    """Whether converted layers on `device` have the codes of `grid` packed: kernels decode them there."""
    return not why_not_packed(device) and (device.type != "cpu" or grid.read or native.takes(grid))


@cache
def why_no_triton(device: torch.device) -> str:
    """Why Triton compiles nothing for the GPU `device`, and the way out; empty where it does."""
    if not find_spec("triton"):
        return "Triton is not installed: pip install 'qkit-quant[cuda]'"
    if not any(map(which, filter(None, (os.environ.get("CC"), *COMPILERS)))):
        return "Triton finds no C compiler: install gcc, or name one in CC"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {'.'.join(map(str, CAPABILITY))}"
    from qkit_torchao.kernels import triton_trial

    return triton_trial.why_not(device)


def multiplies(x: Tensor, grid: Grid) -> bool:
    """Whether `multiply` takes x [rows, inputs] for packed codes on `grid`."""
    return bool(word_kernels(x.device).multiplies(x)) and not why_not_few(grid, x.shape[-1], x.device)


def multiplies_experts(x: Tensor, grid: Grid) -> bool:
    """Whether `multiply` takes x [rows, inputs], each row with the codes of an expert of its own.

    Only on a GPU: on a CPU decoded experts give prepared and converted models the same bits.
    """
    if why_not_packed(x.device) or not hasattr(word_kernels(x.device), "codes_product"):
        return False
    small = grid.has_tensor_scale and x.dtype == torch.float16  # whose tensor scale may leave the range of float16
    return grid.group != "tensor" and not small and not why_not_few(grid, x.shape[-1], x.device)


def multiply(x: Tensor, *parts: Any, **more: Any) -> Tensor:
    """See `cuda_words.multiply`."""
    y: Tensor = word_kernels(x.device).multiply(x, *parts, **more)
    return y


def values(codes: Tensor, *parts: Any, **more: Any) -> Tensor:
    """See `cuda_words.values`."""
    decoded: Tensor = word_kernels(codes.device).values(codes, *parts, **more)
    return decoded


def why_not_few(grid: Grid, inputs: int, device: torch.device) -> str:
    """Why few rows are not multiplied by packed codes on `device`; empty where they are."""
    if inputs % 2:
        return f"inputs are read in pairs, and there are {inputs}"
    if not words.has_one_scale(grid, inputs):
        return f"groups of {grid.group} are no multiples of {words.unit(grid, inputs)}"
    why_not: str = word_kernels(device).why_not_multiplies(device)
    return why_not


def word_kernels(device: torch.device) -> ModuleType:
    """The module of kernels on packed codes for `device`, which `why_not_packed` accepts."""
    if device.type == "cpu":
        return cpu_words
    from qkit_torchao.kernels import cuda_words

    return cuda_words


def multiplies_codes(x: Tensor) -> bool:
    """Whether `codes_product` takes codes x [rows, inputs] of an input: few rows on a GPU that Triton compiles for."""
    return x.is_cuda and _few_rows(len(x)) and _compiles(x.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # dynamo does not trace a cache
def _compiles(device: torch.device) -> bool:
    return not why_no_triton(device)


def _few_rows(count: int) -> bool:
    from qkit_torchao.kernels import cuda_words

    return 0 < count <= cuda_words.FEW


def codes_product(x: Tensor, codes: Tensor, zeros: Tensor | None) -> Tensor:
    """See `cuda_words.codes_product`."""
    from qkit_torchao.kernels import cuda_words

    return cuda_words.codes_product(x, codes, zeros)


def multiplies_rows(x: Tensor) -> bool:
    """Whether `rows_product` takes int8 codes x [rows, inputs]: more rows than `codes_product` takes, on such a GPU."""
    return x.is_cuda and len(x) > 0 and not _few_rows(len(x)) and _compiles(x.device)


def rows_product(
    x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See `cuda_rows.rows_product`."""
    from qkit_torchao.kernels import cuda_rows

    return cuda_rows.rows_product(x, steps, codes, scales, bias, dtype)


def scaled(product: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product [rows, outputs] of codes times the steps of its rows and the scales of its outputs, plus bias, as `dtype`."""
    if product.is_cuda and product.numel() and not torch.compiler.is_compiling() and _compiles(product.device):
        from qkit_torchao.kernels import cuda_words

        return cuda_words.scaled(product, steps, scales, bias, dtype)
    y = product.to(torch.float32) * steps * scales.reshape(1, -1)
    return (y if bias is None else y + bias).to(dtype)


def compute_values(
    weights: list[Tensor],
    targets: list[Tensor],
    gates: list[Tensor],
    grid: Grid,
    partners: list[tuple[Tensor, ...]],
) -> None:
    """Fills each of `targets` with the values of its weight, or with the weight itself where its gate is off.

    Weights are of one type and on one device. One launch, where kernels take all of them.

    Args:
        partners: for each weight, the others that share its tensor scale.
    """
    kernels = _kernels(weights[0])
    together = [
        bool(kernels and all(kernels.takes(one, grid) for one in (w, *others)))
        for w, others in zip(weights, partners, strict=True)
    ]
    for w, target, gate, others, taken in zip(weights, targets, gates, partners, together, strict=True):
        if not taken:
            peak = rounding.shared_peak([w, *others]) if others else None
            target.copy_(torch.where(gate, rounding.rounded(w, grid, peak=peak), w))
    if kernels and any(together):
        parts = [list(compress(tensors, together)) for tensors in (weights, targets, gates)]
        kernels.compute_values(*parts, grid, list(compress(partners, together)))
        torch.autograd.graph.increment_version(parts[1])  # a backward that waits for the values before is told


def on_gpu(w: Tensor) -> ModuleType | None:
    """The module of kernels for tensors on the GPU of `w`; None where there is none."""
    return _kernels(w) if w.is_cuda else None


def _kernels(w: Tensor) -> ModuleType | None:
    """The module of kernels for tensors on the device of `w`: Triton's on a GPU, C's on a CPU where they were built."""
    if torch.compiler.is_compiling():
        return None
    if w.is_cuda:
        return None if why_no_triton(w.device) else _cuda()
    return cpu if w.device.type == "cpu" and cpu.available() else None


@cache
def _cuda() -> ModuleType:
    from qkit_torchao.kernels import cuda

    return cuda
