"""Which of MLX's own containers holds a grid exactly, and how a `QTensor` goes in and comes back. Arrays only.

`mx.qqmm` (`nn.QQLinear`) is not among the choices, because it quantizes its input itself. Tried with 0.32.4. On the CPU it takes
one row ("NYI for the general case" otherwise); there it agrees with ours for mxfp4 and mxfp8 until scales are clipped (R6), and
not for nvfp4, which has no power of two per tensor (R9). On an H200, 7320 of 81792 adversarial values in mxfp8 are others.
"""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit_mlx.packing import packed_codes, unpacked_codes

AFFINE_GROUPS = (128, 64, 32)  # a longer group is repeated at the largest of these that divides it
MX_GROUP = 32
MX_MODES = {"e2m1": "mxfp4", "e4m3": "mxfp8"}


@dataclass(frozen=True, slots=True)
class Container:
    """One of MLX's quantisation modes, at a group size."""

    mode: str
    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The arrays of a container, by MLX's names; see "Bytes" in the numerics.

    Attributes:
        weight: uint32 words [outputs, words].
        scales: [outputs, inputs // group]: float32, or uint8 for the floats.
        biases: `affine` only: float32, shaped like `scales`. A value is u * scale + bias, exactly.
        tensor_scale: `nvfp4` only: float32, shape (): applied to outputs, since MLX's layers take none.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None
    tensor_scale: mx.array | None = None


def container_for(grid: Grid, inputs: int) -> Container | None:
    """The container that holds rows of `inputs` numbers on `grid` exactly, or None."""
    group = grid.group if isinstance(grid.group, int) else inputs
    bits = grid.element.bits
    if grid.element.kind == "integer":
        size = next((size for size in AFFINE_GROUPS if group % size == 0), None)
        return None if size is None else Container("affine", bits, size)
    if grid.scale == "nvfp4":
        return Container("nvfp4", bits, group)
    if grid.element.name in MX_MODES and group % MX_GROUP == 0:
        return Container(MX_MODES[grid.element.name], bits, MX_GROUP)
    return None


def contain(q: QTensor[mx.array], container: Container) -> Contents:
    """The codes and scales of `q` [outputs, inputs] in MLX's layout. Loses nothing: see `contained`."""
    outputs, inputs = q.shape
    columns = inputs // container.group
    words = packed_codes(q.codes, q.grid.element)
    if container.mode != "affine":
        return Contents(words, _spread(q.scales, outputs, columns), tensor_scale=q.tensor_scale)
    zeros = float(-q.grid.element.lowest) if q.zeros is None else q.zeros.astype(mx.float32)
    return Contents(words, _spread(q.scales, outputs, columns), _spread(-zeros * q.scales, outputs, columns))


def contained(contents: Contents, grid: Grid, *, inputs: int, dtype: DType) -> QTensor[mx.array]:
    """The inverse of `contain`."""
    shape = grid.scale_shape((contents.weight.shape[0], inputs))
    codes = unpacked_codes(contents.weight, element=grid.element, n=inputs, symmetric=grid.symmetric)
    scales = _gather(contents.scales, shape)
    zeros = None
    if not grid.symmetric:  # bias = -z * s is exact, so the quotient is too
        zeros = mx.round(-_gather(cast(mx.array, contents.biases), shape) / scales).astype(mx.uint8)
    return QTensor(codes, scales, grid, dtype, zeros=zeros, tensor_scale=contents.tensor_scale)


def _spread(per_group: mx.array, outputs: int, columns: int) -> mx.array:
    """Scales [outputs or 1, groups] repeated to [outputs, columns]."""
    return mx.repeat(mx.broadcast_to(per_group, (outputs, per_group.shape[1])), columns // per_group.shape[1], axis=1)


def _gather(spread: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The inverse of `_spread`: the first of each run of equal scales."""
    outputs, groups = shape
    return spread.reshape(spread.shape[0], groups, -1)[:outputs, :, 0]
