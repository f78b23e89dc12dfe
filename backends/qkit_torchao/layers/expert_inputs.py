"""The inputs and outputs of experts on grids: which experts take them, and the ranges and scales of one expert."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qkit.errors import BackendError
from qkit.expert_inputs import slots
from qkit.rules import Rule
from qkit_torchao.layers.stacks import Stack


def check_activation(module: nn.Module, rule: Rule) -> None:
    """Refuses grids of inputs and outputs for experts whose inputs and outputs this engine does not reach.

    Raises:
        BackendError: the message names their class.
    """
    gated = hasattr(getattr(module, "base", type(module)), "_apply_gate") and getattr(module, "has_gate", False)
    if rule.slots and not gated:
        raise BackendError(
            f"{type(module).__name__} shows no input of its down projection, so that its experts take no "
            f"{' and no '.join(rule.slots)} grid: give them a rule of kind experts without one"
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


def ranges_of(rule: Rule, stacks: Iterable[Stack]) -> list[str]:
    """The buffers [experts, 2] with the lowest and the highest inputs and outputs of experts; none where no range is static."""
    return [f"{place}_range" for place in slots(rule, projections_of(stacks))]


def projections_of(stacks: Iterable[Stack]) -> list[str]:
    """The projections of experts, in the order of their stacks."""
    return [name for stack in stacks for name in stack.projections]
