"""The state of a weight: a stamp that tells whether a value was computed from the weight as it is now."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkit.engines.kept import Kept
from qkit_torchao.cache.shard import SHARDS
from qkit_torchao.kernels import graphs
from qkit_torchao.torch_private import is_transformed, version

T = TypeVar("T")

after_step: list[Callable[[Any], None]] = []  #: called with the optimizer after each of its steps
_steps_taken = 0
_hook: Any = None


class KeptOfTensor(Kept[T]):
    """A `Kept` whose owner is a tensor, with stamps that end as those of `state`.

    Attributes:
        seen: shares the owner's storage, so that no other tensor gets its address.
        captured: whether a CUDA graph computes the value, at replays that nobody sees. Outside of graphs it is never current.
    """

    __slots__ = ("captured", "seen")

    def __init__(self, owner: Tensor, store: Any) -> None:
        self.seen: Tensor | None = None
        self.captured = False

    def current(self, stamp: Any, *_: Any) -> T | None:
        """As `Kept.current`, but None outside of graphs where a graph computes the value."""
        return None if self.captured and not stamp[-1] and not self.frozen else super().current(stamp)


def state(weight: Tensor) -> tuple[Any, ...]:
    """The state of `weight`: version, address, type, device, count of all optimizers' steps (-1 if frozen), captured graph.

    Optimizers step the sharded weight, so that neither the version of a `Shard` nor its `requires_grad` shows that it trains.
    """
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_count_step)
    device, is_part = weight.device, type(weight) in SHARDS
    return (
        weight.changes() if is_part else version(weight),  # type: ignore[attr-defined]
        weight.data_ptr(),
        weight.dtype,
        device,
        _steps_taken if is_part or weight.requires_grad else -1,
        graphs.number(device) if device.type == "cuda" else 0,
    )


def cannot_cache(weight: Tensor) -> bool:
    """Whether no version shows the changes of `weight`, or cached values may not be written: under torch.func's transforms."""
    return weight.is_inference() or is_transformed()


def refuse_older(weights: list[Tensor]) -> None:
    """Has torch refuse to go back through earlier views of `weights`, which share their versions."""
    torch.autograd.graph.increment_version(weights)


def _count_step(optimizer: Any, *_: Any) -> None:
    global _steps_taken
    _steps_taken += 1
    for follow in after_step:
        follow(optimizer)
