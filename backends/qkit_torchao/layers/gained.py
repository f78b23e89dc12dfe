"""Values of codes whose scales train: `arithmetic.gains`, with its gradient where a compiler or a transform takes operations.

Eager code has the product of `adapted_product`, which stores no values.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.qtensor import QTensor
from qkit.reference.gains import UNIT
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.gains import gained, slopes


def values(q: QTensor[Tensor], gains: Tensor) -> Tensor:
    """The values of `q` in float32, its scales times the gains, with the gradient of the gains."""
    found = rounding.dequantize(gained(replace(q, dtype="float32"), gains))
    if not torch.is_grad_enabled():
        return found
    moved = gains[:, None] * (slopes(q) * UNIT)
    return found + (moved - moved.detach())


def values_of(w: Tensor, q: QTensor[Tensor], gains: Tensor, inside: Tensor | None) -> Tensor:
    """`values(q, gains)`, where `q` has the codes of `w`, whose gradient passes straight through, but for outside of `inside`.

    A NaN or an infinity in `w` makes itself NaN.
    """
    found = torch.where(torch.isfinite(w), values(q, gains), torch.nan)
    if not torch.is_grad_enabled():
        return found
    beside = w if inside is None else torch.where(inside, w, w.detach())
    return found + (beside - beside.detach())
