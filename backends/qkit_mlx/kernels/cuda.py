"""Fake-quantizing in one pass over memory, on MLX's CUDA build: which kernel runs how. The source is in `fused_source`."""

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from qkit.grid import Grid
from qkit_mlx.kernels import cuda_source

BLOCK = 256  #: threads of a block
VECTOR = 16  #: bytes that a thread loads at once
WARP = 32
VECTORS = 8  #: of a thread at most, where it keeps its part of a group in registers

GPU = mx.Device(mx.gpu, 0)
FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def fits(x: mx.array, grid: Grid) -> bool:
    """Whether there is a kernel for `x` [..., n] on `grid` here: not on the CPU, on Metal, or where the tensor is the group."""
    return mx.cuda.is_available() and mx.default_device() == GPU and grid.group != "tensor" and x.dtype in FLOATS


def round_to_grid(x: mx.array, grid: Grid) -> mx.array:
    """`ops.round_to_grid` for `x` [..., n] that `fits`."""
    groups = prod(grid.scale_shape(tuple(x.shape)))
    group = x.size // groups
    names, inputs = ["w"], [x.reshape(-1)]
    if grid.scale == "nvfp4":
        names.append("peak")
        inputs.append(mx.maximum(x.max(), -x.min()).astype(mx.float32).reshape(1))
    launched = launch(group, x.size, x.dtype.size)
    (values,) = _kernel(grid, launched.template, tuple(names), x.dtype)(
        inputs=inputs,
        template=[("T", x.dtype), *launched.constants.items()],
        grid=(launched.threads, 1, 1),
        threadgroup=(launched.block, 1, 1),
        output_shapes=[(x.size,)],
        output_dtypes=[x.dtype],
    )
    reshaped: mx.array = values.reshape(x.shape)
    return reshaped


class Launch(NamedTuple):
    """How a kernel is launched: its template and constants, how many threads there are, and how many in a block."""

    template: str
    constants: dict[str, int]
    threads: int
    block: int


def launch(group: int, size: int, itemsize: int) -> Launch:
    """For `size` elements of `itemsize` bytes, in groups of `group`.

    >>> launch(64, 640, 2)[1:]
    ({'G': 64, 'V': 8, 'L': 8, 'K': 1}, 256, 256)
    >>> launch(4096, 8192, 4)[1:]
    ({'G': 4096, 'V': 4, 'L': 256}, 512, 256)
    """
    vector = VECTOR // itemsize if group % (VECTOR // itemsize) == 0 else 1
    groups, vectors = size // group, group // vector
    lanes = min(vectors, WARP)
    if lanes & (lanes - 1) == 0 and vectors % lanes == 0 and vectors // lanes <= VECTORS:
        constants = {"G": group, "V": vector, "L": lanes, "K": vectors // lanes}
        return Launch(cuda_source.SHORT, constants, -(-groups * lanes // BLOCK) * BLOCK, BLOCK)
    lanes = min(BLOCK, -(-vectors // WARP) * WARP)
    return Launch(cuda_source.LONG, {"G": group, "V": vector, "L": lanes}, groups * lanes, lanes)


@lru_cache(maxsize=1024)
def _kernel(grid: Grid, template: str, names: tuple[str, ...], dtype: mx.Dtype) -> Any:
    """The name says all that the source depends on, since MLX keeps kernels by name."""
    kind = "short" if template is cuda_source.SHORT else "long"
    kernel = "_".join([cuda_source.name(grid), kind, *names[1:], str(dtype).rpartition(".")[2]])
    return mx.fast.cuda_kernel(
        name=kernel,
        input_names=list(names),
        output_names=["out"],
        header=cuda_source.header(grid),
        source=cuda_source.body(grid, template),
    )
