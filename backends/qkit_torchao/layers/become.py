"""Modules of another class with the same contents, and moves of modules that keep some types."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qkit.reference.learned import NAMES
from qkit_torchao.torch_private import apply, remove_buffers, remove_parameters, set_buffer

#: Attributes of prepared layers.
PREPARED = ("mode", "calibrating", "frozen", "fused", "simple", "kind", "grid_name", "slot_names", "values_buffer")


def become(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of another class with the parameters, buffers, hooks and mode of `module`."""
    other = cls.__new__(cls)
    attributes = module.__dict__.items()
    other.__dict__.update({key: one.copy() if isinstance(one, (dict, set)) else one for key, one in attributes})
    return other


def forget_preparation(layer: Any) -> None:
    """Removes all that a prepared layer has beside the layer that it was prepared from, but for its rule."""
    for name in PREPARED:
        layer.__dict__.pop(name, None)
    remove_buffers(layer, "gate", "input_range", "output_range")
    remove_parameters(layer, *NAMES)


def apply_but_keep(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool, names: list[str]) -> None:
    """`Module._apply`, but for the type of the buffers `names`, which only follow to the device."""
    before = {name: module.get_buffer(name) for name in names}
    apply(module, fn, recurse)
    for name, buffer in before.items():
        device = module.get_buffer(name).device
        if device.type != "meta" and buffer.device.type != "meta":
            set_buffer(module, name, buffer.to(device))
