"""Codes and scales in MLX's own containers, and out again. `qkit.formats.mlx_lm` lists the containers for a grid. Arrays only.

`mx.qqmm` (`nn.QQLinear`) is not a choice, because it quantizes its input itself, with other values. Tried with 0.32.4. On the CPU
it takes one row ("NYI for the general case" otherwise). There it agrees with R6 for mxfp4 and mxfp8 until scales are clipped, and
disagrees for nvfp4, since it has no power of two per tensor (R9). On an H200, adversarial rows in mxfp8 give other values.
"""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from qkit.formats.mlx_lm import Container
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit_mlx.arithmetic.packing import unpacked_codes
from qkit_mlx.kernels import choose


@dataclass(frozen=True, slots=True)
class Contents:
    """The arrays of a container, by MLX's names; see "Bytes" in numerics.md.

    Attributes:
        weight: packed words, uint32 [outputs, words].
        scales: [outputs, inputs // group]: float32, or uint8 for the floats.
        biases: `affine` only: float32, shaped like `scales`. A value is u * scale + bias, exactly.
        tensor_scale: `nvfp4` only: float32, shape (); multiplies outputs, since MLX's layers have none.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None
    tensor_scale: mx.array | None = None


def contain(q: QTensor[mx.array], container: Container) -> Contents:
    """The codes and scales of `q` [outputs, inputs] in MLX's layout, exactly: `contained` is the inverse."""
    outputs, inputs = q.shape
    columns = inputs // container.group
    weight = choose.packed_codes(q.codes, q.grid.element)
    if q.biases is not None:
        return Contents(weight, q.scales, q.biases)
    if container.mode != "affine":
        return Contents(weight, _spread(q.scales, outputs, columns), tensor_scale=q.tensor_scale)
    zeros = float(-q.grid.element.lowest) if q.zeros is None else q.zeros.astype(mx.float32)
    return Contents(weight, _spread(q.scales, outputs, columns), _spread(-zeros * q.scales, outputs, columns))


def contained(contents: Contents, grid: Grid, *, inputs: int, dtype: DType) -> QTensor[mx.array]:
    """The inverse of `contain`."""
    shape = grid.scale_shape((contents.weight.shape[0], inputs))
    codes = unpacked_codes(contents.weight, element=grid.element, n=inputs, symmetric=grid.symmetric)
    scales = _gather(contents.scales, shape)
    if grid.has_biases:
        return QTensor(codes, scales, grid, dtype, biases=_gather(cast(mx.array, contents.biases), shape))
    zeros = None
    if not grid.symmetric:  # bias = -z * s is exact, so the quotient is too
        zeros = mx.round(-_gather(cast(mx.array, contents.biases), shape) / scales).astype(mx.uint8)
    return QTensor(codes, scales, grid, dtype, zeros=zeros, tensor_scale=contents.tensor_scale)


def _spread(per_group: mx.array, outputs: int, columns: int) -> mx.array:
    """Scales [outputs or 1, groups] repeated to [outputs, columns]; contiguous, since CUDA's kernels take no strides."""
    rows = mx.broadcast_to(per_group, (outputs, per_group.shape[1]))
    return mx.contiguous(mx.repeat(rows, columns // per_group.shape[1], axis=1))


def _gather(spread: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The inverse of `_spread`: the first scale of each run of equal ones."""
    outputs, groups = shape
    return spread.reshape(spread.shape[0], groups, -1)[:outputs, :, 0]
