"""Adapters on prepared and converted experts, which compute with the grid's values of each expert's merged weight."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.fused import shares
from qkit.qtensor import QTensor
from qkit.reference.merged import Update
from qkit_torchao.arithmetic import rounding, stored
from qkit_torchao.arithmetic.merged import dithered
from qkit_torchao.layers import onto_stored, straight_through
from qkit_torchao.layers.become import become
from qkit_torchao.layers.computed_experts import ComputedExperts
from qkit_torchao.layers.expert_inputs import projections_of
from qkit_torchao.layers.experts import Experts, class_of
from qkit_torchao.layers.merged import merge
from qkit_torchao.layers.packed_experts import PackedExperts, put_codes
from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.layers.stack_gradients import stacked
from qkit_torchao.layers.stacks import Stack
from qkit_torchao.torch_private import remove_parameters, set_parameter

NAMES = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude"}  #: ends of the parameters' names


class Adapted(Experts):
    """The common part of adapted experts: parameters such as `gate_proj_lora_A` [experts, rank, inputs].

    Attributes:
        lora_scales: the factor of the product, by projection; a projection that is not there has no adapter.
        lora_dithered: the projections whose base is spread within the cells of its codes.
    """

    lora_scales: dict[str, float]
    lora_dithered: frozenset[str]

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        first = next(iter(self.lora_scales))
        a, _, magnitude = self.factors(first)
        return f"{'lora' if magnitude is None else 'dora'}, rank {a.shape[-2]}"

    def factors(self, projection: str) -> list[Any]:
        """A, B and the magnitudes, [experts, ...], of a projection with an adapter; LoRA has None for magnitudes."""
        return [getattr(self, f"{projection}_{end}", None) for end in NAMES.values()]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [one for name in self.lora_scales for one in self.factors(name) if one is not None]

    def merge_into(self, w: Tensor, projection: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The merged weight of base `w` in `dtype`: [experts, outputs, inputs], or of one expert [outputs, inputs]."""
        if projection not in self.lora_scales:
            return w.to(dtype)
        a, b, magnitude = (one if one is None or expert is None else one[expert] for one in self.factors(projection))
        return merge(w, b, a, magnitude, self.lora_scales[projection], dtype)


class AdaptedExperts(Adapted, ComputedExperts):
    """Prepared experts with adapters; the parameters are the base."""

    def merged(self, stack: Stack) -> Tensor:
        """See `ComputedExperts.merged`; in the type of the base."""
        weight = self.master(stack)
        return stack.join(self.merge_into(part, name, weight.dtype) for name, part in stack.split(weight).items())

    def on_grid(self, weight: Tensor, stack: Stack) -> Tensor:
        """See `ComputedExperts.on_grid`."""
        assert self.rule.weight is not None
        return stacked(weight, None, stack, self.rule.weight, self.rule.ste)


class AdaptedPackedExperts(Adapted, PackedExperts):
    """Converted experts with adapters: their codes are the base, decoded as tokens reach an expert."""

    def decoded(self, stack: Stack, expert: int) -> Tensor:
        """The values of one expert's merged weight, laid out as in `stack`; the gradient is straight through."""
        grid, ste = self.rule.weight, self.rule.ste
        assert grid is not None
        parts = self.merged(stack, expert)
        if grid.read:
            onto = (
                onto_stored.fake_requantize(one, self.quantized(name, expert), ste=ste) for name, one in parts.items()
            )
            return stack.join(one.to(rounding.DTYPE[self.dtype]) for one in onto)
        peak = _peak(parts.values(), self)
        values = (straight_through.fake_quantize(part, grid, ste=ste, peak=peak) for part in parts.values())
        return stack.join(one.to(rounding.DTYPE[self.dtype]) for one in values)

    def merged(self, stack: Stack, expert: int) -> dict[str, Tensor]:
        """The merged weights of one expert by projection, [outputs, inputs], in float32."""
        out = {}
        for name in stack.projections:
            q = replace(self.quantized(name, expert), dtype="float32")
            base = dithered(q) if name in self.lora_dithered else rounding.dequantize(q)
            out[name] = self.merge_into(base, name, torch.float32, expert)
        return out


def adapt(module: Any, updates: Mapping[str, Update]) -> Any:
    """See `TrainsExperts.adapt_experts`."""
    kind = AdaptedPackedExperts if isinstance(module, PackedExperts) else AdaptedExperts
    layer = become(module, _class(kind, module))
    device = next(iter(module.parameters() if kind is AdaptedExperts else module.buffers())).device
    layer.lora_scales = {}
    for name in projections_of(layer.stacks):
        if name not in updates:
            continue
        for part, end in NAMES.items():
            array = updates[name].parts().get(part)
            trained = None if array is None else nn.Parameter(torch.tensor(array, device=device))
            layer.register_parameter(f"{name}_{end}", trained)
        layer.lora_scales[name] = updates[name].scale
    layer.lora_dithered = frozenset(name for name, update in updates.items() if update.dithered)
    return layer


def updates_of(module: Adapted) -> dict[str, Update]:
    """See `TrainsExperts.expert_updates`."""
    found = {}
    for name, scale in module.lora_scales.items():
        a, b, magnitude = (
            None if one is None else one.detach().float().cpu().numpy().copy() for one in module.factors(name)
        )
        assert a is not None
        assert b is not None
        found[name] = Update(a, b, scale, magnitude, name in module.lora_dithered)
    return found


def merge_adapter(module: Any) -> Any:
    """See `Adapts.merge_adapter`."""
    if isinstance(module, AdaptedPackedExperts):
        with torch.no_grad():
            q = _merged_codes(module)
        packed = _without_adapter(module, PackedExperts)
        put_codes(packed, q)
        return packed
    with torch.no_grad():
        merged = {stack.name: module.merged(stack) for stack in module.stacks}
    prepared = _without_adapter(module, FakeExperts)
    for name, weight in merged.items():
        set_parameter(prepared, name, nn.Parameter(weight, requires_grad=False))
    return prepared.train(module.training)


def _merged_codes(module: AdaptedPackedExperts) -> dict[str, list[QTensor[Tensor]]]:
    grid = module.rule.weight
    assert grid is not None
    out: dict[str, list[QTensor[Tensor]]] = {}
    for stack in module.stacks:
        for expert in range(stack.shape[0]):
            parts = module.merged(stack, expert)
            peak = _peak(parts.values(), module)
            for name, part in parts.items():
                if grid.read:
                    q = stored.requantize(part, module.quantized(name, expert))
                else:
                    q = rounding.quantize(part, grid, peak=peak)
                out.setdefault(name, []).append(replace(q, dtype=module.dtype))
    return out


def _peak(parts: Iterable[Tensor], module: Any) -> Tensor | None:
    """The largest magnitude of gate and up of one expert, where they share a tensor scale."""
    several = list(parts)
    return rounding.shared_peak(several) if shares(module.rule.weight) and len(several) > 1 else None


def _without_adapter(module: Any, kind: type[Experts]) -> Any:
    layer = become(module, _class(kind, module))
    names = projections_of(layer.stacks)
    remove_parameters(layer, *(f"{name}_{end}" for name in names for end in NAMES.values()))
    for name in ("lora_scales", "lora_dithered", "found"):
        layer.__dict__.pop(name, None)
    return layer


def _class(kind: type[Experts], module: Any) -> Any:
    return class_of(kind, module.base, tuple(stack.name for stack in module.stacks))
