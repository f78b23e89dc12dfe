"""qkit's C kernels on torch's CPU tensors, in their own memory; the same functions as `cuda`, for `choose`."""

import ctypes
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit import native
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.scale_rules import amax, poison
from qkit_torchao.torch_private import is_transformed

PLAIN = (Tensor, torch.nn.Parameter)  #: other classes may have no memory of their own

#: Pairs of element and scale rule that the kernels compute: integers of up to a byte, and three small floats.
TAKES = frozenset(
    {
        *product((f"int{bits}" for bits in range(2, 9)), ("signed", "absmax", "midmax", "minmax")),
        *product(("e2m1", "e4m3", "e5m2"), ("rceil", "even", "floor")),
        ("e2m1", "nvfp4"),
    }
)


def available() -> bool:
    """Whether the kernels were built."""
    return native.available()


def takes(w: Tensor, grid: Grid) -> bool:
    """Whether the kernels take `w` on `grid`: contiguous, of memory that they may read, outside of torch.func's transforms."""
    if type(w) not in PLAIN or w.dtype not in rounding.DTYPE.values() or not w.is_contiguous() or not w.numel():
        return False
    return (grid.element.name, grid.scale) in TAKES and not is_transformed()


def values(w: Tensor, grid: Grid, *, gate: Tensor | None = None, peak: Tensor | None = None) -> Tensor:
    """`rounding.rounded(w, grid, peak=peak)`, or a copy of `w` where there is a `gate` that is off."""
    if gate is not None and not gate:
        return w.detach().clone()
    result = torch.empty_like(w.detach())
    native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(result), peak=_number(peak))
    return result


def quantize(
    w: Tensor,
    grid: Grid,
    *,
    values: Tensor | None = None,
    steps: Tensor | None = None,
    peak: Tensor | None = None,
) -> QTensor[Tensor]:
    """As `cuda.quantize`."""
    q = native.quantize(_memory(w), grid, dtype=dtype_of(w), peak=_number(peak)).map(torch.from_numpy)
    if values is not None:
        native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(values), peak=_number(peak))
    if steps is not None:
        steps.copy_(rounding.scale_values(q) + poison(amax(rounding.group(w.detach(), grid))))
    return q


def compute_values(
    weights: list[Tensor],
    targets: list[Tensor],
    gates: list[Tensor],
    grid: Grid,
    partners: list[tuple[Tensor, ...]],
) -> None:
    """As `cuda.compute_values`."""
    largest: dict[int, float] = {}  # of each weight once, by its address

    def magnitude(w: Tensor) -> float:
        if w.data_ptr() not in largest:
            largest[w.data_ptr()] = float(np.abs(native.extremes(_memory(w), dtype=dtype_of(w))).max())
        return largest[w.data_ptr()]

    for w, target, gate, others in zip(weights, targets, gates, partners, strict=True):
        peak = float(np.max([magnitude(one) for one in (w, *others)])) if others else None
        if gate and w.dtype == target.dtype and target.is_contiguous():
            native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(target), peak=peak)
        else:
            target.copy_(values(w, grid, gate=gate, peak=None if peak is None else torch.tensor(peak)))


def _number(peak: Tensor | None) -> float | None:
    return None if peak is None else float(peak)


def decodes(q: QTensor[Tensor]) -> bool:
    """False: `rounding` decodes."""
    return False


def _memory(x: Tensor) -> NDArray[Any]:
    """`x` as NumPy; as int16 patterns where NumPy lacks the type. `Tensor.numpy` would bind memory that FSDP frees."""
    kind: Any = ctypes.c_int16 if x.element_size() == 2 else ctypes.c_float
    memory: NDArray[Any] = np.ctypeslib.as_array((kind * x.numel()).from_address(x.data_ptr()))
    return memory.reshape(x.shape)
