"""Launches the kernels of `cuda_source` on MLX's CUDA build: fake quantization in one pass over memory."""

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

from qkit.grid import Grid
from qkit_mlx.kernels import cuda_source

BLOCK = 256  #: threads of a block
VECTOR = 16  #: bytes that a thread loads at once
WARP = 32
VECTORS = 8  #: most vectors of a thread that holds its part of a group in registers

GPU = mx.Device(mx.gpu, 0)
FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def takes(x: mx.array, grid: Grid) -> bool:
    """Whether a kernel fake-quantizes `x` [..., n] on `grid` on this device: not on the CPU, and not on Metal."""
    here = mx.cuda.is_available() and mx.default_device() == GPU
    return here and x.dtype in FLOATS and cuda_source.declares(grid)


def fake_quantize(x: mx.array, grid: Grid, *, peak: mx.array | None = None) -> mx.array:
    """`rounding.fake_quantize(x, grid, peak=peak)` for `x` [..., n]."""
    groups = prod(grid.scale_shape(tuple(x.shape)))
    group = x.size // groups
    names, inputs = ["w"], [x.reshape(-1)]
    if grid.scale == "nvfp4":
        names.append("peak")
        largest = mx.maximum(x.max(), -x.min()).astype(mx.float32) if peak is None else peak
        inputs.append(largest.reshape(1))
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
    """The launch of a kernel: its template and constants, the number of threads, and the threads of a block."""

    template: str
    constants: dict[str, int]
    threads: int
    block: int


def launch(group: int, size: int, itemsize: int) -> Launch:
    """The launch for `size` elements of `itemsize` bytes, in groups of `group`.

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
    """The kernel for `grid`. Its name holds everything that the source depends on, since MLX caches kernels by name."""
    kind = "short" if template is cuda_source.SHORT else "long"
    kernel = "_".join([cuda_source.name(grid), kind, *names[1:], str(dtype).rpartition(".")[2]])
    return mx.fast.cuda_kernel(
        name=kernel,
        input_names=list(names),
        output_names=["out"],
        header=cuda_source.header(grid),
        source=cuda_source.body(grid, template),
    )
