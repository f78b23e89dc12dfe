"""qkit's C kernels on torch's CPU tensors, in their own memory; the same functions as `launch`, for `fused`."""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit import native
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.arithmetic import rounding

PLAIN = (Tensor, torch.nn.Parameter)  #: others may have no memory of their own


def available() -> bool:
    """Whether the kernels were built."""
    return native.available()


def takes(w: Tensor, grid: Grid) -> bool:
    """Whether the kernels take `w`: a contiguous one of memory that they may read, outside of torch.func's transforms."""
    if type(w) not in PLAIN or w.dtype not in rounding.DTYPE.values() or not w.is_contiguous() or not w.numel():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def values(w: Tensor, grid: Grid, *, gate: Tensor | None = None) -> Tensor:
    """`ops.rounded(w, grid)`, or a copy of `w` where there is a `gate` that is off."""
    if gate is not None and not gate:
        return w.detach().clone()
    made = torch.empty_like(w.detach())
    native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(made))
    return made


def quantize(w: Tensor, grid: Grid, *, values: Tensor | None = None, steps: Tensor | None = None) -> QTensor[Tensor]:
    """As `launch.quantize`."""
    q = native.quantize(_memory(w), grid, dtype=dtype_of(w)).map(torch.from_numpy)
    if values is not None:
        native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(values))
    if steps is not None:
        steps.copy_(rounding.scale_values(q) + rounding.poison(rounding.amax(rounding.group(w.detach(), grid))))
    return q


def make_values(weights: list[Tensor], made: list[Tensor], gates: list[Tensor], grid: Grid) -> None:
    """As `launch.make_values`."""
    for w, target, gate in zip(weights, made, gates, strict=True):
        if gate and w.dtype == target.dtype and target.is_contiguous():
            native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), out=_memory(target))
        else:
            target.copy_(values(w, grid, gate=gate))


def decodes(q: QTensor[Tensor]) -> bool:
    """`ops` decodes."""
    return False


def _memory(x: Tensor) -> NDArray[Any]:
    """`x` as NumPy; the patterns, as int16, of what NumPy has no type for. `Tensor.numpy` would bind memory that FSDP frees."""
    kind: Any = ctypes.c_int16 if x.element_size() == 2 else ctypes.c_float
    held: NDArray[Any] = np.ctypeslib.as_array((kind * x.numel()).from_address(x.data_ptr()))
    return held.reshape(x.shape)
