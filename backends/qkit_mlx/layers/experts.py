"""Experts: mlx-lm's blocks of stacked linear layers, prepared, converted and back. `stacks` has the prepared stacks.

A block is a module whose parts are the projections of all experts. Its own code calls them, with whatever activation it has.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit.expert_inputs import name_of
from qkit.qtensor import QTensor
from qkit.reference.ranges import static_contents, static_names
from qkit.rules import Rule
from qkit_mlx.layers import stacks
from qkit_mlx.layers.become import become
from qkit_mlx.layers.converted_experts import CONVERTED_STACKS, pack_stack
from qkit_mlx.layers.stacks import FakeSwitchLinear
from qkit_mlx.mlx_private import frozen_names

#: Names of the parts in mlx-lm's blocks, by projection.
PARTS = (
    {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"up_proj": "fc1", "down_proj": "fc2"},
)

_classes: dict[type[nn.Module], Any] = {}  #: of prepared blocks, by the class of the block


def parts(module: Any) -> dict[str, Any]:
    """The stacks of a block of experts by projection, in the order of `qkit.experts.PROJECTIONS`; {} for any other module."""
    switch = sys.modules.get("mlx_lm.models.switch_layers")  # whoever has such modules has imported it
    if switch is None or not isinstance(module, (switch.SwitchGLU, switch.SwitchMLP)):
        return {}
    for names in PARTS:
        found = {projection: module.get(name) for projection, name in names.items()}
        if all(_is_stack(part, switch) for part in found.values()):
            return found
    return {}


class FakeBlock(nn.Module):
    """The common part of prepared blocks, whose class is also that of the block.

    Attributes:
        base: the class of the block.
        all_experts: whether calibration shows every token to every expert, for its ranges alone.
    """

    base: type[nn.Module]
    all_experts = False

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x [..., inputs], indices [..., chosen] -> [..., chosen, outputs]."""
        block: Any = super()
        mine = parts(self).values()
        if self.all_experts and any(part.calibrating for part in mine):
            count = next(iter(mine)).num_experts
            block.__call__(x, mx.broadcast_to(mx.arange(count, dtype=indices.dtype), (*indices.shape[:-1], count)))
        answer: mx.array = block.__call__(x, indices)
        return answer


def prepare_experts(module: Any, rule: Rule) -> nn.Module:
    """The training form of a block: its stacks compute with their values on the grid."""
    return with_parts(module, {name: stacks.prepare_stack(part, rule) for name, part in parts(module).items()})


def restore_experts(module: Any) -> nn.Module:
    """The block that `prepare_experts` was given, with the same parameters."""
    cls = sys.modules["mlx_lm.models.switch_layers"].SwitchLinear
    made = {}
    for name, part in parts(module).items():
        plain = cls.__new__(cls)
        nn.Module.__init__(plain)  # not its own, which draws random weights
        for key in ("weight", "bias"):
            if key in part:
                plain[key] = part[key]
        plain.freeze(keys=list(frozen_names(part) & {"weight", "bias"}))
        plain.train(part.training)
        made[name] = plain
    return with_parts(module, made)


def pack_experts(
    module: Any, q: Mapping[str, Sequence[QTensor[mx.array]]], rule: Rule, static: Mapping[str, mx.array]
) -> nn.Module:
    """The converted form of a block: by projection, the quantized weight of each expert."""
    made = {}
    for name, part in parts(module).items():
        mine = {key: static[name_of(key, name)] for key in static_contents(rule)}
        made[name] = pack_stack(q[name], rule, bias=part.get("bias"), experts=len(q[name]), static=mine)
        made[name].train(module.training)
    return with_parts(module, made)


def unpack_experts(module: Any) -> dict[str, list[QTensor[mx.array]]]:
    """The inverse of `pack_experts`."""
    return {name: [part.unpack(e) for e in range(part.num_experts)] for name, part in parts(module).items()}


def ranges_of(module: Any) -> dict[str, mx.array]:
    """The ranges [experts, 2] of prepared experts, by the names of `qkit.expert_inputs.slots`."""
    found: dict[str, mx.array] = {}
    for name, part in parts(module).items():
        for slot in static_names(part.rule):
            found[name_of(slot, name)] = part[f"{slot}_range"]
    return found


def scales_of(module: Any) -> dict[str, mx.array]:
    """The static scales [experts] of converted experts, by the names of `qkit.expert_inputs.static_names`."""
    return {name_of(key, name): part[key] for name, part in parts(module).items() for key in static_contents(part.rule)}


def with_parts(module: Any, made: Mapping[str, nn.Module]) -> nn.Module:
    """A block as `module` with other stacks."""
    base = getattr(module, "base", type(module))
    prepared = any(isinstance(part, FakeSwitchLinear) for part in made.values())
    block: nn.Module = become(module, _class_of(base) if prepared else base)
    block.__dict__.pop("all_experts", None)
    names = next(names for names in PARTS if names.keys() == made.keys())
    for projection, part in made.items():
        block[names[projection]] = part
    if "gate_proj" in made:
        stacks.share(made["gate_proj"], made["up_proj"])
    return block


def _class_of(base: type[nn.Module]) -> Any:
    if base not in _classes:
        _classes[base] = type(f"Fake{base.__name__}", (FakeBlock, base), {"base": base, "__module__": __name__})
    return _classes[base]


def _is_stack(part: Any, switch: Any) -> bool:
    return type(part) is switch.SwitchLinear or isinstance(part, (FakeSwitchLinear, *CONVERTED_STACKS))
