"""`qkit.reference.read_scales` in torch, bit for bit: the fp32 step of each group of a read grid."""

import torch
from torch import Tensor

from qkit.grid import read_rule
from qkit.qtensor import QTensor
from qkit.reference.read_scales import NAN, SMALLEST


def read_steps(q: QTensor[Tensor]) -> Tensor:
    """The fp32 step of every group [..., groups] of `q`, which is on a read grid."""
    rule = read_rule(q.grid)
    if rule.scales == "float":
        return q.scales.to(torch.float32)
    if rule.scales == "e8m0":
        return e8m0_values(q.scales)
    blocks = q.scales.view(torch.float8_e4m3fn).to(torch.float32)
    assert q.tensor_scale is not None
    return alone("divide", blocks, q.tensor_scale) if rule.inverse else blocks * q.tensor_scale


def e8m0_values(c: Tensor) -> Tensor:
    """2^(c-127) for codes 0 .. 254, the smallest of which is subnormal; NaN for 255."""
    u = c.to(torch.int32)
    return torch.where(u == 0, SMALLEST, torch.where(u == 255, NAN, u << 23)).view(torch.float32)


def alone(operation: str, x: Tensor, y: Tensor) -> Tensor:
    """x + y or x / y in fp32, rounded once. Code compiled for a GPU would join a product with the sum, and approximate `/`."""
    if torch.compiler.is_compiling() and x.is_cuda:
        result: Tensor = torch.ops.qkit.alone(operation, x, y)
        return result
    return _alone(operation, x, y)


def _alone(operation: str, x: Tensor, y: Tensor) -> Tensor:
    return x + y if operation == "add" else x / y


_library = torch.library.Library("qkit", "FRAGMENT")
_library.define("alone(str operation, Tensor x, Tensor y) -> Tensor")
_library.impl("alone", _alone, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::alone", _alone, lib=_library)
