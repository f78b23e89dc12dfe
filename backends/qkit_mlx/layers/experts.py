"""Experts: mlx-lm's blocks of stacked linear layers, and their prepared form. Modules only; `converted_experts` has the codes.

A block is a module whose parts are the projections of all experts. Its own code calls them, with whatever activation it has.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from qkit.errors import BackendError
from qkit.fused import shares
from qkit.qtensor import QTensor
from qkit.rules import Rule
from qkit_mlx.layers.become import become
from qkit_mlx.layers.converted_experts import CONVERTED_STACKS, pack_stack, quantize_stack, refuse_lora
from qkit_mlx.layers.execution import GPU
from qkit_mlx.layers.prepared import FakeLinear, evaluate_packed, quantizes, values_of

#: Names of the parts in mlx-lm's blocks, by projection.
PARTS = (
    {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    {"up_proj": "fc1", "down_proj": "fc2"},
)


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


def prepare_experts(module: Any, rule: Rule) -> nn.Module:
    """The training form of a block: its stacks compute with their values on the grid.

    Raises:
        BackendError: the rule has static ranges, or one scale for the inputs of all experts.
    """
    if rule.range != "dynamic" or (rule.activation and rule.activation.group == "tensor"):
        raise BackendError(
            f"experts have no {rule.range} ranges and no scale for all inputs together: each sees other tokens; "
            "give their rule an activation grid by groups or rows, or none"
        )
    made = {name: FakeSwitchLinear(part, rule) for name, part in parts(module).items()}
    if "gate_proj" in made:
        made["gate_proj"].__dict__["partner"] = made["up_proj"]
        made["up_proj"].__dict__["partner"] = made["gate_proj"]
    return _with_parts(module, made)


def pack_experts(module: Any, q: Mapping[str, Sequence[QTensor[mx.array]]], rule: Rule) -> nn.Module:
    """The converted form of a block: by projection, the quantized weight of each expert."""
    made = {
        name: pack_stack(q[name], rule, bias=part.get("bias"), experts=len(q[name]))
        for name, part in parts(module).items()
    }
    for layer in made.values():
        layer.train(module.training)
    return _with_parts(module, made)


def unpack_experts(module: Any) -> dict[str, list[QTensor[mx.array]]]:
    """The inverse of `pack_experts`."""
    return {name: [part.unpack(e) for e in range(part.num_experts)] for name, part in parts(module).items()}


class FakeSwitchLinear(FakeLinear):
    """A stack of linear layers whose weights [experts, outputs, inputs] are on a grid; otherwise as `FakeLinear`.

    Attributes:
        partner: the other of gate and up, which shares the tensor's scale of each expert under `nvfp4`; no part of the model
            at this place. Absent where there is none.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        """x [..., 1 or chosen, rows, inputs], indices [..., chosen] -> [..., chosen, rows, outputs]."""
        parameters = [self[name] for name in ("weight", "bias") if name in self]

        def run_prepared(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
            x = self._on_grid(x, self.rule.activation, "input")
            w = values_of(self, weight).swapaxes(-1, -2)
            y = _gather_multiply(x, w, indices, sorted_indices)
            y = y if bias is None else y + mx.expand_dims(bias[indices], -2)
            return self._on_grid(y, self.rule.output, "output")

        def run_packed(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
            pieces = quantize_stack(weight, self.rule.weight, peaks=self.shared_peak(weight))
            packed = pack_stack(pieces, self.rule, bias=bias, experts=len(weight))
            return packed(x, indices, sorted_indices)

        if self.training or not quantizes(self):
            return run_prepared(x, *parameters)
        return evaluate_packed(run_packed, run_prepared, x, *parameters)

    def shared_peak(self, weight: mx.array) -> mx.array | None:
        """The largest magnitude of each expert's weight and its partner's, [experts]; None where they share no tensor scale."""
        partner = self.__dict__.get("partner")
        if partner is None or not shares(self.rule.weight):
            return None
        both = (mx.abs(mx.stop_gradient(one)).max(axis=(1, 2)) for one in (weight, partner["weight"]))
        return mx.maximum(*both).astype(mx.float32)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> NoReturn:
        """Refuses: mlx-lm would add its adapter beside the grid."""
        refuse_lora(self)


def _gather_multiply(x: mx.array, w: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """`mx.gather_mm`, which takes float32 alone on a CPU (0.32.4)."""
    if mx.default_device() == GPU:
        return mx.gather_mm(x, w, rhs_indices=indices, sorted_indices=sorted_indices)
    wide = mx.gather_mm(x.astype(mx.float32), w.astype(mx.float32), rhs_indices=indices, sorted_indices=sorted_indices)
    return wide.astype(x.dtype)


def _is_stack(part: Any, switch: Any) -> bool:
    return type(part) is switch.SwitchLinear or isinstance(part, (FakeSwitchLinear, *CONVERTED_STACKS))


def _with_parts(module: Any, made: Mapping[str, nn.Module]) -> nn.Module:
    """A block as `module` with other stacks."""
    block: nn.Module = become(module, type(module))
    names = next(names for names in PARTS if names.keys() == made.keys())
    for projection, part in made.items():
        block[names[projection]] = part
    return block
