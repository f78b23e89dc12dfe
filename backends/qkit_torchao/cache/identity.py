"""What tells one state of a weight from another, for those who keep something that was made of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkit_torchao.kernels import graphs

after_step: list[Callable[[Any], None]] = []  #: what is given an optimizer when its step has been counted
_steps_taken = 0
_hook: Any = None


def state(weight: Tensor) -> tuple[Any, ...]:
    """The state of `weight`: version, address, type, device, all optimizers' steps unless frozen; last, the graph captured."""
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_count_step)
    return (
        weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.device,
        _steps_taken if weight.requires_grad else -1,
        graphs.number(weight.device),
    )


def old(stamp: tuple[Any, ...], now: tuple[Any, ...], captured: bool) -> bool:
    """Whether what was made at `stamp` is out of date `now`; what a graph has made always is, outside of it."""
    return stamp != now or (captured and not now[-1])


def refuse_older(weights: list[Tensor]) -> None:
    """Has torch refuse to go back through views of `weights`, which share their versions."""
    torch.autograd.graph.increment_version(weights)


def _count_step(optimizer: Any, *_: Any) -> None:
    global _steps_taken
    _steps_taken += 1
    for follow in after_step:
        follow(optimizer)
