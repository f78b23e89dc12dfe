"""`qkit.reference.read_scales` in MLX, bit for bit: the fp32 step of each group of a read grid."""

from collections.abc import Callable

import mlx.core as mx

from qkit.grid import read_rule
from qkit.qtensor import QTensor
from qkit.reference.read_scales import NAN, SMALLEST


def read_steps(q: QTensor[mx.array], e4m3_values: Callable[[mx.array], mx.array]) -> mx.array:
    """The fp32 step of every group [..., groups] of `q`, which is on a read grid. `e4m3_values` decodes scales of blocks."""
    rule = read_rule(q.grid)
    if rule.scales == "float":
        return q.scales.astype(mx.float32)
    if rule.scales == "e8m0":
        return e8m0_values(q.scales)
    blocks = e4m3_values(q.scales)
    assert q.tensor_scale is not None
    return blocks / q.tensor_scale if rule.inverse else blocks * q.tensor_scale


def e8m0_values(c: mx.array) -> mx.array:
    """2^(c-127) for codes 0 .. 254, the smallest of which is subnormal; NaN for 255."""
    u = c.astype(mx.int32)
    return mx.where(u == 0, SMALLEST, mx.where(u == 255, NAN, u << 23)).view(mx.float32)
