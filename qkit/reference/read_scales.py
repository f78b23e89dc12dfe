"""The law of read grids: the fp32 step of each group, from scales as a file has them."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qkit.grid import read_rule
from qkit.qtensor import QTensor
from qkit.reference.scale_rules import Floats

SMALLEST = 0x00400000  #: the fp32 pattern of 2^-127, which E8M0 code 0 stands for
NAN = 0x7FC00000  #: E8M0 code 255 is no number


def read_steps(q: QTensor[NDArray[Any]]) -> Floats:
    """The fp32 step of every group [..., groups] of `q`, which is on a read grid."""
    rule = read_rule(q.grid)
    if rule.scales == "float":
        return q.scales.astype(np.float32)
    if rule.scales == "e8m0":
        return e8m0_values(q.scales)
    import ml_dtypes  # here, since float scales need no type of NumPy's extensions

    blocks = q.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert q.tensor_scale is not None
    return cast(Floats, blocks / q.tensor_scale if rule.inverse else blocks * q.tensor_scale)


def e8m0_values(c: NDArray[np.uint8]) -> Floats:
    """2^(c-127) for codes 0 .. 254, the smallest of which is subnormal; NaN for 255."""
    u = c.astype(np.int32) << 23
    return np.where(c == 0, np.int32(SMALLEST), np.where(c == 255, np.int32(NAN), u)).view(np.float32)
