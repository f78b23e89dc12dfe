"""What turns quantisation on and off: one tensor for on and one for off on each device, which all prepared layers share."""

from functools import cache

import torch
from torch import Tensor


def of(device: torch.device, *, on: bool) -> Tensor:
    """The bool [] that means `on`; nobody writes to it. Layers are switched by being given the other one."""
    return torch.tensor(on, device=device) if device.type == "meta" else _made(device, on)


@cache
def _made(device: torch.device, on: bool) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(on, device=device)
