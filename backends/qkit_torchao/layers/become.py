"""Modules of another class with the same contents, and moves of modules that keep some types."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from qkit.reference.learned import FIRSTS, NAMES
from qkit_torchao.torch_private import MANAGED, apply, remove_buffers, remove_parameters, set_buffer

#: Attributes of prepared layers.
PREPARED = ("mode", "calibrating", "frozen", "fused", "simple", "kind", "grid_name", "slot_names", "values_buffer")


def become(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of another class with the parameters, buffers, hooks and mode of `module`.

    FSDP2 refers to the modules whose weights it shards: such a module itself gets the class.
    """
    if MANAGED in module.__dict__:
        before = type(module)
        wrapper: Any = before.__bases__[0]
        module.__class__ = _under(wrapper, cls) if is_wrapped(before) else cls  # type: ignore[arg-type]  # a class is hashable
        return module
    other = cls.__new__(cls)
    attributes = module.__dict__.items()
    other.__dict__.update({key: one.copy() if isinstance(one, (dict, set)) else one for key, one in attributes})
    return other


def is_wrapped(cls: type) -> bool:
    """Whether `cls` is the class that FSDP makes of another, as FSDPLinear(FSDPModule, Linear)."""
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__.startswith("torch.distributed")


@cache
def _under(wrapper: Any, cls: Any) -> Any:
    """The class by which FSDP wraps `cls`, by the name that FSDP gives it."""
    prefix = wrapper.__name__.removesuffix("Module")
    return type(f"{prefix}{cls.__name__}", (wrapper, cls), {"__module__": wrapper.__module__})


def forget_preparation(layer: Any) -> None:
    """Removes all that a prepared layer has beside the layer that it was prepared from, but for its rule."""
    for name in PREPARED:
        layer.__dict__.pop(name, None)
    remove_buffers(layer, "gate", "input_range", "output_range")
    remove_parameters(layer, *NAMES, *FIRSTS)


def apply_but_keep(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool, names: list[str]) -> None:
    """`Module._apply`, but for the type of the buffers `names`, which only follow to the device."""
    before = {name: module.get_buffer(name) for name in names}
    apply(module, fn, recurse)
    for name, buffer in before.items():
        device = module.get_buffer(name).device
        if device.type != "meta" and buffer.device.type != "meta":
            set_buffer(module, name, buffer.to(device))
