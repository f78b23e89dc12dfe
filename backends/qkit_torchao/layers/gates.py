"""The two gates of a device, which turn the quantization of prepared layers on and off."""

from functools import cache

import torch
from torch import Tensor


def gate(device: torch.device, *, on: bool) -> Tensor:
    """The bool [] that means `on`, one for all layers of a device. It is read only: a switched layer gets the other one."""
    return torch.tensor(on, device=device) if device.type == "meta" else _gate(device, on)


@cache
def _gate(device: torch.device, on: bool) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(on, device=device)
