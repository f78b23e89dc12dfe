"""The inputs of experts on grids: which experts take them, and the ranges and scales of one expert."""

from typing import Any

from torch import Tensor, nn

from qkit.errors import BackendError
from qkit.expert_inputs import INPUTS
from qkit.rules import Rule


def check_activation(module: nn.Module, rule: Rule) -> None:
    """Refuses an activation grid for experts whose inputs this engine does not reach.

    Raises:
        BackendError: the message names their class.
    """
    gated = hasattr(getattr(module, "base", type(module)), "_apply_gate") and getattr(module, "has_gate", False)
    if rule.activation is not None and not gated:
        raise BackendError(
            f"{type(module).__name__} shows no input of its down projection, so that its experts take no activation grid: give "
            "them a rule of kind experts without one"
        )


class OneExpert:
    """One expert of a module, as a layer with static ranges or scales of its own."""

    def __init__(self, layer: Any, expert: int) -> None:
        self._layer, self._expert = layer, expert

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module."""
        return getattr(self._layer, name)

    def get_buffer(self, name: str) -> Tensor:
        """The part of a buffer that is this expert's: a range [2], or a scale [1]."""
        buffer: Tensor = self._layer.get_buffer(name)
        return buffer[self._expert] if buffer.dim() > 1 else buffer[self._expert : self._expert + 1]


def ranges_of(rule: Rule) -> tuple[str, ...]:
    """The buffers [experts, 2] with the lowest and the highest inputs that experts have seen; none where no range is static."""
    return () if rule.range == "dynamic" else tuple(f"{place}_range" for place in INPUTS)
