"""Fake-quantizing in one pass over memory, on MLX's CUDA build: which kernel runs how. The source is in `fused_source`."""

from functools import lru_cache
from math import prod
from typing import Any

import mlx.core as mx

from qkit.grid import Grid
from qkit_mlx import fused_source

BLOCK = 256  #: threads of a block
VECTOR = 16  #: bytes that a thread loads at once
WARP = 32
VECTORS = 8  #: of a thread at most, where it keeps its part of a group in registers

GPU = mx.Device(mx.gpu, 0)


def fits(x: mx.array, grid: Grid) -> bool:
    """Whether there is a kernel for `x` [..., n] on `grid` here: not on the CPU, on Metal, or where the tensor is the group."""
    return mx.cuda.is_available() and mx.default_device() == GPU and grid.group != "tensor"


def round_to_grid(x: mx.array, grid: Grid, *, on: mx.array | None = None) -> mx.array:
    """The values of `x` [..., n], which `fits`, on `grid`; `x` itself where `on`, a boolean of shape (), is false."""
    groups = prod(grid.scale_shape(tuple(x.shape)))
    group = x.size // groups
    names, inputs = ["w"], [x.reshape(-1)]
    if grid.scale == "nvfp4":
        names.append("peak")
        inputs.append(mx.maximum(x.max(), -x.min()).astype(mx.float32).reshape(1))
    if on is not None:
        names.append("on")
        inputs.append(on.reshape(1))
    template, constants = _layout(group, x.dtype.size)
    short = template is fused_source.SHORT
    threads = -(-groups * constants["L"] // BLOCK) * BLOCK if short else groups * constants["L"]
    (values,) = _kernel(grid, template, tuple(names), x.dtype)(
        inputs=inputs,
        template=[("T", x.dtype), ("G", group), *constants.items()],
        grid=(threads, 1, 1),
        threadgroup=(BLOCK if short else constants["L"], 1, 1),
        output_shapes=[(x.size,)],
        output_dtypes=[x.dtype],
    )
    return values.reshape(x.shape)


def _layout(group: int, size: int) -> tuple[str, dict[str, int]]:
    """The template for groups of `group` elements of `size` bytes, and its constants.

    >>> _layout(64, 2)[1], _layout(1024, 2)[1], _layout(4096, 4)[1]
    ({'V': 8, 'L': 8, 'K': 1}, {'V': 8, 'L': 32, 'K': 4}, {'V': 4, 'L': 256})
    """
    vector = VECTOR // size if group % (VECTOR // size) == 0 else 1
    vectors = group // vector
    lanes = min(vectors, WARP)
    if lanes & (lanes - 1) == 0 and vectors % lanes == 0 and vectors // lanes <= VECTORS:
        return fused_source.SHORT, {"V": vector, "L": lanes, "K": vectors // lanes}
    return fused_source.LONG, {"V": vector, "L": min(BLOCK, -(-vectors // WARP) * WARP)}


@lru_cache(maxsize=1024)
def _kernel(grid: Grid, template: str, names: tuple[str, ...], dtype: mx.Dtype) -> Any:
    """The name says all that the source depends on, since MLX keeps kernels by name."""
    kind = "short" if template is fused_source.SHORT else "long"
    kernel = "_".join([fused_source.name(grid), kind, *names[1:], str(dtype).rpartition(".")[2]])
    return mx.fast.cuda_kernel(
        name=kernel,
        input_names=list(names),
        output_names=["out"],
        header=fused_source.header(grid),
        source=fused_source.body(grid, template, gated="on" in names),
    )
