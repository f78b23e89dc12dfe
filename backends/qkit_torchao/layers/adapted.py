"""Adapters on prepared and converted layers, which compute with the grid's values of the merged weight. Eager and compiled."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.engines.layer import Mode
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.merged import Update
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding, stored
from qkit_torchao.arithmetic.gains import gained as gain
from qkit_torchao.kernels import choose, merge
from qkit_torchao.layers import (
    adapted_experts,
    converted,
    fused,
    gained,
    onto_stored,
    products,
    sharded,
    straight_through,
)
from qkit_torchao.layers.adapted_product import Merging, multiply
from qkit_torchao.layers.agreement import want_one_recipe
from qkit_torchao.layers.become import become
from qkit_torchao.layers.converted import PackedLinear
from qkit_torchao.layers.experts import Experts
from qkit_torchao.layers.merged import merge as merge_layer
from qkit_torchao.layers.prepared import FakeLinear
from qkit_torchao.layers.slots import seen_scales, slot, static_scales
from qkit_torchao.torch_private import is_transformed, remove_parameters

#: Of parameters, by the names of `Update`.
NAMES = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude", "gains": "lora_gains"}


class _Adapted(nn.Module):
    """The common part of adapted layers: the parameters of the adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_gains: nn.Parameter | None
    lora_scale: float
    asked: bool = False

    def own_weight(self) -> Tensor:
        """The merged weight, for layers that share its tensor scale."""
        with torch.no_grad():
            return self.merged()

    def merged(self) -> Tensor:
        """The merged weight [outputs, inputs]."""
        raise NotImplementedError

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'lora' if self.lora_magnitude is None else 'dora'}, rank {len(self.lora_A)}"

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [one for name in NAMES.values() if (one := getattr(self, name)) is not None]

    def merge_into(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight of base `w` [outputs, inputs], in `dtype`."""
        self._ask()
        return merge_layer(w, self.lora_B, self.lora_A, self.lora_magnitude, self.lora_scale, dtype)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """B, A and the magnitudes, which only DoRA has."""
        self._ask()
        return self.lora_B, self.lora_A, self.lora_magnitude

    def _ask(self) -> None:
        if not (torch.compiler.is_compiling() or self.asked):
            want_one_recipe(self)
        sharded.want_own_types(self, *NAMES.values())


class AdaptedLinear(_Adapted, FakeLinear):
    """A prepared layer with an adapter; `weight` is the base."""

    caches = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        rule, weight = self.rule, self.weight
        if torch.compiler.is_compiling() or is_transformed() or not x.numel() or (self.kind and self._takes_codes(x)):
            return super().forward(x)
        sharded.gathered(self)  # refuses a rounded weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x = self.slot(x, "input", rule.activation)
        y = multiply(x, weight, self.factors, self.bias, self._merging(), dtype)
        return self.slot(y, "output", rule.output)

    def _merging(self) -> Merging:
        def on_grid(merged: Tensor) -> Tensor:
            return choose.rounded(merged, grid, peak=straight_through.peak_of(merged, fused.partners(self)))

        def unclipped(merged: Tensor) -> Tensor:
            return rounding.unclipped(merged, grid, peak=straight_through.peak_of(merged, fused.partners(self)))

        def at_once(w: Tensor | None, b: Tensor, a: Tensor, out: torch.dtype) -> Tensor:
            assert w is not None
            return merge.values(w, b, a, self.lora_scale, dtype, grid, spread=False, on=self.mode != "off", out=out)

        grid, dtype = self.weight_grid, self.weight.dtype
        kernel = at_once if merge.is_one_pass(grid, self.weight, self.in_features, spread=False) else None
        if self.mode == "off":
            return Merging(None, self.lora_scale, dtype, "identity", torch.detach, unclipped, kernel)
        return Merging(None, self.lora_scale, dtype, self.rule.ste, on_grid, unclipped, kernel)

    def merged(self) -> Tensor:
        """The merged weight [outputs, inputs], in the type of the base."""
        sharded.gathered(self)  # refuses a rounded weight
        return self.merge_into(self.weight, self.weight.dtype)

    def _values(self, weight: Tensor, dtype: torch.dtype, *, cached: bool) -> Tensor:
        merged = self.merged()
        if torch.compiler.is_compiling():
            return torch.where(self.gate, self._on_grid(merged), merged).to(dtype)
        return (merged if self.mode == "off" else self._on_grid(merged)).to(dtype)

    def _multiply_codes(self, x: Tensor) -> Tensor:
        static = seen_scales(self, x, "input", self.rule.activation)
        grids = self.grid_name, self.slot_names["input"]
        return products.multiply_codes(x, self.merged(), self.bias, grids, self.rule.ste, **static)


class AdaptedPacked(_Adapted, PackedLinear):  # type: ignore[override]  # `weight` is read only
    """A converted layer with an adapter: its codes are the base, decoded in each forward.

    Attributes:
        fused: the other layers that share a tensor scale with this one, see `Fuses.fuse`.
    """

    fused: tuple[Any, ...] = ()
    mode: Mode = "on"
    lora_dithered: bool

    def switch_mode(self, mode: Mode) -> None:
        """`off`: the layer computes with the decoded base and the product beside it, until `on` puts their sum on the grid."""
        self.mode = mode

    def base(self) -> Tensor:
        """The decoded base [outputs, inputs], in float32; spread within the cells of its codes, if the adapter wants it so."""
        return converted.spread_values(self) if self.lora_dithered else converted.values(self, torch.float32)

    def _beside(self) -> Tensor:
        """The decoded base that the product is beside in the first part of a run; its scales times the gains."""
        if self.lora_gains is None:
            return converted.values(self, torch.float32)
        return gained.values(converted.unpack(self), self.lora_gains)

    def new_codes(self, merged: Tensor) -> QTensor[Tensor]:
        """The codes of a merged weight, in float32, before its scales are multiplied with gains."""
        if (grid := _grid(self.rule)).read:
            return stored.requantize(merged, converted.unpack(self))
        return rounding.quantize(merged, grid, peak=self._peak(merged))

    def merged(self) -> Tensor:
        """The merged weight [outputs, inputs] that the grid rounds, in float32."""
        return self.merge_into(self.base(), torch.float32)

    def values_of_merged(self) -> Tensor:
        """The values of the merged weight [outputs, inputs], in the type of the layer, with their gradient."""
        off = self.mode == "off"
        values = self.merge_into(self._beside(), torch.float32) if off else self._on_grid(self.merged())
        return values.to(rounding.DTYPE[self.dtype])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], those of the layer once merged; the gradient is straight through."""
        grid, activation = _grid(self.rule), self.rule.activation
        dtype = rounding.DTYPE[self.dtype] if torch.is_autocast_enabled(x.device.type) else x.dtype  # they may differ
        if activation and self.execution.both and x.numel() and self.mode != "off":
            grids, static = (str(grid), str(activation)), static_scales(self, "input", activation)
            y = products.multiply_codes(x, self.merged(), self.bias, grids, self.rule.ste, **static)
        elif torch.compiler.is_compiling() or is_transformed() or not x.numel():
            y = F.linear(slot(self, x, "input", activation), self.values_of_merged().to(dtype), self.bias)
        else:
            x, merging = slot(self, x, "input", activation), self._merging()
            y = multiply(x, None, self.factors, self.bias, merging, dtype, gains=self.lora_gains)
        return slot(self, y, "output", self.rule.output)

    def _merging(self) -> Merging:
        grid = _grid(self.rule)

        def on_grid(merged: Tensor) -> Tensor:
            if gains is not None or grid.read:
                return self._on_grid(merged)
            return choose.rounded(merged, grid, peak=self._peak(merged))

        def at_once(w: Tensor | None, b: Tensor, a: Tensor, out: torch.dtype) -> Tensor:
            return merge.values(self.parts(), b, a, *kinds, spread=spread, on=not off, out=out, gains=scaled)

        def along(b: Tensor, a: Tensor, out: torch.dtype) -> Tensor:
            made = None if off else merge.values(self.parts(), b, a, *kinds, spread=spread, on=True, out=out)
            return converted.values(self, out) if made is None else made

        off, gains = self.mode == "off", self.lora_gains
        scaled = None if gains is None else gains.detach()
        spread, words = self.lora_dithered and not off, self.execution.layout == "words"
        kinds, options = (self.lora_scale, torch.float32, grid), {"spread": spread, "gained": gains is not None}
        one_pass = words and merge.is_one_pass(grid, self.get_buffer("scales"), self.in_features, **options)
        kernel, slope = (at_once, along) if one_pass else (None, None)
        more = self._unclipped, kernel, lambda w: converted.unpack(self) if off else self.new_codes(w), slope
        if off:
            return Merging(self._beside, self.lora_scale, torch.float32, "identity", torch.detach, *more)
        return Merging(self.base, self.lora_scale, torch.float32, self.rule.ste, on_grid, *more)

    def _unclipped(self, merged: Tensor) -> Tensor:
        if (grid := _grid(self.rule)).read:
            return stored.unclipped(merged, converted.unpack(self))
        return rounding.unclipped(merged, grid, peak=self._peak(merged))

    def _peak(self, merged: Tensor) -> Tensor | None:
        return straight_through.peak_of(merged, fused.partners(self))

    def _on_grid(self, merged: Tensor) -> Tensor:
        grid, ste = _grid(self.rule), self.rule.ste
        if self.lora_gains is not None:
            finite = torch.where(torch.isfinite(merged), merged, 0.0).detach()
            inside = self._unclipped(finite) if ste == "masked" else None
            return gained.values_of(merged, self.new_codes(finite), self.lora_gains, inside)
        if grid.read:
            return onto_stored.fake_requantize(merged, converted.unpack(self), ste=ste)
        return straight_through.fake_quantize(merged, grid, ste=ste, peak=self._peak(merged))


def adapt(module: Any, update: Update) -> Any:
    """See `Adapts.adapt`."""
    packed = isinstance(module, PackedLinear)
    adapted = become(module, AdaptedPacked if packed else AdaptedLinear)
    device = module.weight.device
    for name, own in NAMES.items():
        array = update.parts().get(name)
        trained = None if array is None else nn.Parameter(torch.tensor(array, device=device))
        adapted.register_parameter(own, trained)
    adapted.lora_scale, adapted.asked = update.scale, False
    if packed:
        adapted.lora_dithered = update.dithered
    else:
        adapted.values_buffer = None
    return adapted


def adapter_update(module: Any) -> Update:
    """See `Adapts.adapter_update`."""
    a, b, magnitude, gains = (
        None if one is None else one.detach().float().cpu().numpy().copy()
        for one in (getattr(module, own) for own in NAMES.values())
    )
    assert a is not None
    assert b is not None
    return Update(a, b, module.lora_scale, magnitude, getattr(module, "lora_dithered", False), gains)


def merge_adapter(module: Any) -> Any:
    """See `Adapts.merge_adapter`."""
    if isinstance(module, Experts):
        return adapted_experts.merge_adapter(module)
    with torch.no_grad():
        weight = module.merged()
    if isinstance(module, AdaptedPacked):
        q = replace(module.new_codes(weight), dtype=module.dtype)
        q = gain(q, module.lora_gains) if module.lora_gains is not None else q
        return _without_adapter(converted.pack(module, q, module.rule, static={}, owner=None))
    prepared = _without_adapter(become(module, FakeLinear))
    prepared.weight = nn.Parameter(weight, requires_grad=False)
    return prepared.train(module.training)  # drops the cached values, which are the base's


def train_only_adapters(model: nn.Module) -> None:
    """See `Adapts.train_only_adapters`."""
    adapted = (module for module in model.modules() if isinstance(module, (_Adapted, adapted_experts.Adapted)))
    trained = {id(one) for module in adapted for one in module.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _without_adapter(layer: Any) -> Any:
    remove_parameters(layer, *NAMES.values())
    for name in ("lora_scale", "lora_dithered", "mode", "asked"):
        if (name in layer.__dict__ and not isinstance(layer, FakeLinear)) or name == "lora_scale":
            del layer.__dict__[name]
    return layer


def _grid(rule: Rule) -> Grid:
    assert rule.weight is not None
    return rule.weight
