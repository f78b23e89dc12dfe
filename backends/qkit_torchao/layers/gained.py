"""Values of codes with gains: `arithmetic.gains`, with its gradient where a compiler or a transform takes operations.

Eager code has the product of `adapted_product`, which stores no values.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.qtensor import QTensor
from qkit.reference.gains import SHIFT, UNIT
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.gains import gained, slopes


def values(q: QTensor[Tensor], gains: Tensor) -> Tensor:
    """The values of `q` in float32 with `gains` of its scales and biases, and their gradient."""
    found: Tensor = rounding.dequantize(gained(replace(q, dtype="float32"), gains))
    if not torch.is_grad_enabled():
        return found
    by_group = slopes(q).unflatten(1, (gains.shape[1], -1))
    moved = gains[..., :1] * (by_group * UNIT)
    if gains.shape[2] == 2:
        moved = moved + (gains[..., 1] * (SHIFT * q.scales.float()))[..., None]
    moved = moved.flatten(1)
    straight: Tensor = found + (moved - moved.detach())
    return straight


def values_of(w: Tensor, q: QTensor[Tensor], gains: Tensor, inside: Tensor | None) -> Tensor:
    """`values(q, gains)`, where `q` has the codes of `w`, whose gradient passes straight through, but for outside of `inside`.

    A NaN or an infinity in `w` makes itself NaN.
    """
    found = torch.where(torch.isfinite(w), values(q, gains), torch.nan)
    if not torch.is_grad_enabled():
        return found
    beside = w if inside is None else torch.where(inside, w, w.detach())
    return found + (beside - beside.detach())
