"""Modules of another class with the same contents, and moves of modules that keep some types."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qkit_torchao.torch_private import apply, set_buffer


def become(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of another class with the parameters, buffers, hooks and mode of `module`."""
    other = cls.__new__(cls)
    attributes = module.__dict__.items()
    other.__dict__.update({key: one.copy() if isinstance(one, (dict, set)) else one for key, one in attributes})
    return other


def apply_but_keep(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool, names: list[str]) -> None:
    """`Module._apply`, but for the type of the buffers `names`, which only follow to the device."""
    before = {name: module.get_buffer(name) for name in names}
    apply(module, fn, recurse)
    for name, buffer in before.items():
        device = module.get_buffer(name).device
        if device.type != "meta" and buffer.device.type != "meta":
            set_buffer(module, name, buffer.to(device))
