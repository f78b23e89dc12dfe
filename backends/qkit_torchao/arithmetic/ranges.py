"""Ranges of static activations: float32 [2], the lowest and the highest value seen."""

import torch
from torch import Tensor

from qkit.element import AVERAGE

EMPTY = (torch.inf, -torch.inf)  #: the range before any value was seen


def extremes(x: Tensor) -> Tensor:
    """The lowest and the highest value of `x`, float32 [2]."""
    return torch.stack(torch.aminmax(x.detach())).to(torch.float32)


def wider(seen: Tensor, extremes: Tensor) -> Tensor:
    """The range of both; extremes that are not finite change nothing."""
    both = torch.stack([torch.minimum(seen[0], extremes[0]), torch.maximum(seen[1], extremes[1])])
    return torch.where(extremes.isfinite().all(), both, seen)


def averaged(seen: Tensor, extremes: Tensor) -> Tensor:
    """The running average after one more step; the first extremes replace the empty range."""
    moved = torch.where(seen[0] > seen[1], extremes, seen + AVERAGE * (extremes - seen))
    return torch.where(extremes.isfinite().all(), moved, seen)
