"""How a module of transformers stacks the weights of experts in its parameters, and their values on a grid.

Read off transformers 5.23: `use_experts_implementation` says how parameters lie (`is_transposed`, `is_concatenated`), and classes
without it, as Llama 4's, show it by their shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.experts import PROJECTIONS
from qkit.grid import Grid
from qkit_torchao.arithmetic import rounding
from qkit_torchao.kernels import choose
from qkit_torchao.torch_private import parameter

GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter with weights of all experts: [experts, outputs, inputs], or [experts, inputs, outputs] where transposed.

    Attributes:
        name: of the parameter.
        projections: those in it; the outputs of one follow those of the other, or stand in turn where interleaved.
        shape: of one projection of all experts, [experts, outputs, inputs].
    """

    name: str
    projections: tuple[str, ...]
    shape: tuple[int, int, int]
    transposed: bool
    interleaved: bool

    def split(self, w: Tensor) -> dict[str, Tensor]:
        """The projections in the parameter `w`, [experts, outputs, inputs]: views."""
        return self._parts(w.transpose(-1, -2) if self.transposed else w)

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Projections [..., outputs, inputs] as they lie in the parameter, contiguous: the inverse of `split`."""
        rows = self._rows(list(parts))
        return (rows.transpose(-1, -2) if self.transposed else rows).contiguous()

    def split_products(self, y: Tensor) -> dict[str, Tensor]:
        """The products [tokens, outputs] of each projection in `y`, those with one expert's part of the parameter."""
        return {name: part[0].mT.contiguous() for name, part in self._parts(y.mT[None]).items()}

    def join_products(self, parts: Iterable[Tensor]) -> Tensor:
        """The inverse of `split_products`."""
        return self._rows([part.mT for part in parts]).mT.contiguous()

    def _parts(self, rows: Tensor) -> dict[str, Tensor]:
        count = len(self.projections)
        parts = [rows[:, i::count] for i in range(count)] if self.interleaved else rows.chunk(count, dim=1)
        return dict(zip(self.projections, parts, strict=True))

    def _rows(self, several: list[Tensor]) -> Tensor:
        return torch.stack(several, dim=-2).flatten(-3, -2) if self.interleaved else torch.cat(several, dim=-2)

    def values(self, w: Tensor, grid: Grid) -> Tensor:
        """The values of the parameter `w` on `grid`, those of each expert's projections by themselves; no gradient passes."""
        return self._by_expert(w, grid, choose.rounded)

    def unclipped(self, w: Tensor, grid: Grid) -> Tensor:
        """True where `w` is not clipped, see `Arrays.unclipped`."""
        return self._by_expert(w, grid, rounding.unclipped)

    def _by_expert(self, w: Tensor, grid: Grid, function: Any) -> Tensor:
        """`function` of each matrix and `grid`; gate and up of an expert are one matrix where they share a tensor's scale."""
        if grid.group == "tensor":
            return self.join(
                torch.stack([function(one.contiguous(), grid) for one in part]) for part in self.split(w).values()
            )
        rows = (w.transpose(-1, -2) if self.transposed else w).contiguous()
        made: Tensor = function(rows, grid) if grid.by_rows else torch.stack([function(one, grid) for one in rows])
        return made.transpose(-1, -2).contiguous() if self.transposed else made


def stacks_of(module: nn.Module) -> tuple[Stack, ...]:
    """The parameters of `module` that stack experts; empty where it is no module of experts that qkit knows."""
    named = {name: parameter(module, name) for name in ("gate_up_proj", *PROJECTIONS)}
    found = {name: tuple(w.shape) for name, w in named.items() if w is not None and w.dim() == 3}
    first = "gate_up_proj" if "gate_up_proj" in found else "up_proj"
    if "down_proj" not in found or first not in found or "gate_proj" in found:
        return ()
    count = 2 if first == "gate_up_proj" else 1
    (experts, *one), (others, *two) = found[first], found["down_proj"]
    straight = one[0] == count * two[1] and one[1] == two[0]
    across = one[1] == count * two[0] and one[0] == two[1]
    said = getattr(module, "is_transposed", None)
    transposed = bool(across and not straight) if said is None else bool(said)
    if experts != others or not (across if transposed else straight) or (said is None and straight and across):
        return ()
    interleaved = count == 2 and not getattr(module, "is_concatenated", True)
    outputs, inputs = reversed(one) if transposed else one
    up = Stack(first, GATE_UP[2 - count :], (experts, outputs // count, inputs), transposed, interleaved)
    down = Stack("down_proj", ("down_proj",), (experts, inputs, outputs // count), transposed, False)
    return up, down


def shapes_of(stacks: Iterable[Stack]) -> dict[str, tuple[int, int, int]]:
    """The shape of each projection of all experts, [experts, outputs, inputs]."""
    return {name: stack.shape for stack in stacks for name in stack.projections}


def split(module: Any, stacks: Iterable[Stack]) -> dict[str, Tensor]:
    """The weights of float or prepared experts by projection, [experts, outputs, inputs]: views without gradients."""
    out: dict[str, Tensor] = {}
    for stack in stacks:
        w = parameter(module, stack.name)
        assert w is not None
        out |= stack.split(w.detach())
    return out


def join(stacks: Iterable[Stack], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that hold `weights` [experts, outputs, inputs], by name."""
    return {stack.name: stack.join(weights[name] for name in stack.projections) for stack in stacks}
