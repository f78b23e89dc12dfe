"""Prepared layers: they train on their grid, and swap in for Linear and Embedding."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.engines.layer import Mode
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.reference.ranges import static_names
from qkit.rules import Rule
from qkit_torchao.arithmetic import ranges
from qkit_torchao.cache import values
from qkit_torchao.cache.identity import cannot_cache
from qkit_torchao.layers import fused, operators, parallel, products, sharded, slots, straight_through
from qkit_torchao.layers.agreement import want_one_recipe
from qkit_torchao.layers.become import apply_but_keep
from qkit_torchao.layers.execution import fits_kernel
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.settling import put_on, reserve_codes, settle
from qkit_torchao.layers.shared_codes import multiply_current, multiply_shared
from qkit_torchao.layers.shown import Shown
from qkit_torchao.torch_private import MANAGED, Managed, is_any_autocast_enabled


class Prepared(Shown):
    """The common part of prepared layers: a rule, ranges of static activations, and a gate.

    The gate is a bool tensor that turns quantization on. Compiled code reads it, so that a switch compiles nothing anew, unless
    some layers are switched and others are not. Eager code reads `mode`, so that it never waits for the device. All layers of
    one mode share one gate, so that compiled code quantizes an input once for all layers that share the input.

    Attributes:
        caches: whether the values depend on the weight alone, so that they can be cached until it changes.
        grid_name, slot_names: grids as text, which compiled code can pass on.
        kind: see `products.kind`. `fits`: see `execution.fits_kernel`.
        values_buffer: see `values.buffer`; None where the layer has none.
        frozen: whether the values are fixed between updates, see `freeze_values`.
        fused: the other layers that share a tensor scale with this one, see `Fuses.fuse`.
        simple, dynamic: whether the layer only multiplies values that depend on weight and input, see `settling.settle`.
        gathers_values: whether FSDP gathers values in the place of the weight, see `shard_first`. `asked`: see `agreement`.
    """

    caches: ClassVar[bool] = True
    rule: Rule
    kind: str
    fits: dict[Any, bool]
    grid_name: str
    slot_names: dict[str, str]
    weight: Tensor
    gate: Tensor
    values_buffer: Tensor | None
    mode: Mode
    calibrating: bool
    frozen: bool
    fused: "tuple[Prepared, ...]" = ()
    simple: bool
    dynamic: bool
    gathers_values: bool = False
    asked: bool = False

    @property
    def multiplies_codes(self) -> bool:
        """Whether a kernel may multiply integer codes, whose values in 16 bits are rounded; those of floats are exact."""
        return self.kind == "int8" and self.gate.is_cuda

    @property
    def weight_grid(self) -> Grid:
        """The grid of the weight, which every rule of a prepared layer has."""
        assert self.rule.weight is not None
        return self.rule.weight

    def own_weight(self) -> Tensor:
        """The weight whose values the layer computes with."""
        return self.weight

    def train(self, mode: bool = True) -> Any:
        """As any module; besides, the next use recomputes the values."""
        fused.drop(self)
        return super().train(mode)

    def switch_mode(self, mode: Mode) -> None:
        """See `Modules.switch_mode`."""
        sharded.release(self)
        self.mode, self.calibrating = mode, mode == "calibrating"
        settle(self)
        self.gate = gate(self.gate.device, on=mode != "off")
        if self.frozen:
            (values.thaw if mode == "off" else values.freeze)(self.weight)

    def freeze_values(self, on: bool) -> None:
        """See `Trains.freeze_values`."""
        unseen = sharded.is_managed(self) or cannot_cache(self.weight)
        if on and (unseen or self.kind):
            why = "are gathered or cannot be watched" if unseen else "may be multiplied as codes"
            text = f"values on {self.weight_grid} cannot be frozen, since these weights {why}: use interval 1"
            raise BackendError(text)
        self.frozen = on
        settle(self)
        (values.freeze if on and self.mode != "off" else values.thaw)(self.weight)

    def regrid(self, rule: Rule) -> None:
        """See `Trains.regrid`."""
        sharded.release(self)
        put_on(self, rule)
        settle(self)
        (values.freeze if self.frozen and self.mode != "off" else values.thaw)(self.weight)

    def clear_ranges(self) -> None:
        """See `Modules.clear_ranges`."""
        for name in static_names(self.rule):
            self.get_buffer(f"{name}_range").copy_(torch.tensor(ranges.EMPTY))

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """The weight's quantized values in `dtype`, or the weight where the layer is switched off."""
        sharded.want_partitioned_by_none(self.weight)
        if not (torch.compiler.is_compiling() or self.asked):
            want_one_recipe(self)
        if (how := sharded.gathered(self)) == "values":
            return self.weight.to(dtype)
        if not how and sharded.is_shard(self.weight):
            return parallel.weight_values(self, dtype)  # type: ignore[no-any-return]
        return self._values(self.weight, dtype, cached=not how)

    def _values(self, weight: Tensor, dtype: torch.dtype, *, cached: bool) -> Tensor:
        grid, ste = self.weight_grid, self.rule.ste
        if torch.compiler.is_compiling():
            if self.training and self.frozen:
                return operators.frozen_values(weight, self.gate, self.grid_name, ste, dtype, [*fused.partners(self)])
            return torch.where(self.gate, self._on_grid(weight), weight).to(dtype)
        if self.mode == "off":
            return weight.to(dtype)
        if not (cached and self.training) or cannot_cache(weight):
            return self._on_grid(weight).to(dtype)
        buffer = self.values_buffer
        fits = buffer is not None and buffer.dtype == dtype and values.may_use(weight, buffer)
        partners = fused.partners(self)
        known = values.of(weight, grid, self.gate, dtype, partners, into=buffer if fits else None)
        return straight_through.values_view(weight, known, grid, ste=ste, partners=partners)

    def _on_grid(self, weight: Tensor) -> Tensor:
        peak = straight_through.peak_of(weight, fused.partners(self))
        return straight_through.fake_quantize(weight, self.weight_grid, ste=self.rule.ste, peak=peak)

    def slot(self, x: Tensor, name: str, grid: Grid | None) -> Tensor:
        """`x` on the grid of the slot `name`, `input` or `output`; `x` itself where there is none or the layer is off."""
        if grid is None:
            return x
        if not torch.compiler.is_compiling():
            return x if self.mode == "off" else self._quantized(x, name, grid)
        if self.rule.range == "dynamic":
            return operators.on_grid(x, self.gate, self.slot_names[name], self.rule.ste)
        return torch.where(self.gate, self._quantized(x, name, grid), x)

    def _quantized(self, x: Tensor, name: str, grid: Grid) -> Tensor:
        if sharded.is_shard(x):
            return parallel.on_grid(self, x, name, grid)
        if self.rule.range == "dynamic":
            return straight_through.shared(x, grid, taker=self, ste=self.rule.ste)
        static = slots.seen_scales(self, x, name, grid)
        return x if self.calibrating else straight_through.fake_quantize(x, grid, ste=self.rule.ste, **static)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As any module; a float model's checkpoint has no ranges, and leaves them as they are."""
        for name in static_names(self.rule):
            state_dict.setdefault(f"{prefix}{name}_range", self.get_buffer(f"{name}_range"))
        super()._load_from_state_dict(state_dict, prefix, *more)
        if self.gate.is_meta and not self.weight.is_meta:  # the state was assigned to a model without memory
            self.gate = gate(self.weight.device, on=self.mode != "off")
        sharded.install(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any module; a copy has its own buffer of values."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._renew_buffer()

    def _renew_buffer(self) -> None:
        if self.values_buffer is not None:  # of a layer that is not sharded
            self.values_buffer = values.buffer(self.weight, self.weight_grid, self.gate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but keeps ranges in float32; the gate is that of the new device."""
        apply_but_keep(self, fn, recurse, [f"{name}_range" for name in static_names(self.rule)])
        self.gate = gate(self.gate.device, on=self.mode != "off")
        self._renew_buffer()
        reserve_codes(self)
        sharded.install(self)
        return self


setattr(Prepared, MANAGED, Managed(sharded.install))


class FakeLinear(Prepared, nn.Linear):
    """A linear layer that computes with its weight's quantized values, and its input's and output's if the rule has grids.

    `weight` and `bias` are the parameters of the layer it replaces; the gradient of the quantized weight is that of `weight`.

    `forward` chooses the first product that applies:

    - eager, training, on, cached values current, all dynamic, no autocast: `straight_through.multiply_values`, with these values
    - CUDA, mode on, and a kernel multiplies codes of both sides once converted: `multiply_current`, else `multiply_codes`
    - FSDP gathered values for this call, or the layer is tensor parallel: `F.linear`, on values of parts of the weight
    - FSDP gathered the weight for this call: `operators.multiply_values`, on values that are not cached
    - compiled, in training: `operators.multiply_values`, on cached values in `values_buffer`
    - else `F.linear`: on the weight where the mode is off; on values computed for this call where scales are learned, adapters
      are merged, the weight cannot be watched, or in evaluation, since averages copied in by `.data` leave no trace; otherwise on
      cached values
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        if (current := self._current_values()) is not None:
            return self._multiply_current(x, current)
        if self.kind and (product := multiply_current(self, x)) is not None:
            return product
        if not (torch.compiler.is_compiling() or self.asked):
            want_one_recipe(self)
        weight, rule = self.weight, self.rule
        if self.gathers_values and sharded.has_values(self, x) and self.dynamic:
            return F.linear(self.slot(x, "input", rule.activation), weight, self.bias)
        if self.kind and self._takes_codes(x):
            return self.slot(self._multiply_codes(x), "output", rule.output)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x = self.slot(x, "input", rule.activation)
        sharded.want_partitioned_by_none(weight)
        gathered = sharded.gathered(self)
        if gathered and self.values_buffer is not None:
            self.values_buffer = None  # it is of the size of the whole weight
        if gathered == "values" or sharded.is_shard(weight):
            narrow = None if self.bias is None else self.bias.to(dtype)
            found = weight.to(dtype) if gathered == "values" else self.weight_values(dtype)
            return self.slot(F.linear(x.to(dtype), found, narrow), "output", rule.output)
        if self.caches and (gathered or (torch.compiler.is_compiling() and self.training)):
            options = self.gate, self.weight_grid, self.grid_name, rule.ste, dtype
            more: Any = {"cached": not gathered, "buffer": self.values_buffer, "partners": [*fused.partners(self)]}
            y = operators.multiply_values(x, weight, self.bias, *options, **more)
        else:
            y = F.linear(x, self._values(weight, dtype, cached=True), self.bias)
        return self.slot(y, "output", rule.output)

    def _current_values(self) -> Tensor | None:
        """The cached values, where they are current and the layer needs nothing else. Checks only conditions that can change."""
        if torch.compiler.is_compiling() or not (self.simple and self.training) or is_any_autocast_enabled():
            return None
        weight, gate = self._parameters.get("weight"), self._buffers["gate"]
        assert gate is not None
        if weight is None or sharded.is_managed(self) or cannot_cache(weight):  # None, where something computes it
            return None
        return values.current(weight, self.weight_grid, gate, self.values_buffer, fused.partners(self))

    def _multiply_current(self, x: Tensor, current: Tensor) -> Tensor:
        rule, weight = self.rule, self._parameters["weight"]
        assert weight is not None
        before = x.shape[:-1]
        if rule.activation is not None:
            x = straight_through.shared(x, rule.activation, taker=self, ste=rule.ste, rows=True)
        options: Any = {"ste": rule.ste, "partners": fused.partners(self)}
        y = straight_through.multiply_values(x, weight, current, self.bias, self.weight_grid, **options)
        if len(before) + 1 != y.dim():
            y = y.view(*before, y.shape[-1])
        return y if rule.output is None else straight_through.shared(y, rule.output, taker=self, ste=rule.ste)

    def _takes_codes(self, x: Tensor) -> bool:
        """Whether a kernel will multiply codes of both sides once the layer is converted, so that training must, too.

        Python reads the mode here, so compiled code is compiled once more after a switch: products of integers and of floats
        are two kernels, and no tensor chooses between them.
        """
        if self.weight.device.type != "cuda" or sharded.is_shard(self.weight) or sharded.gathered(self) == "values":
            return False
        if self.mode != "on" or x.dtype != self.weight.dtype or not x.numel():
            return False
        return fits_kernel(self, x)

    def _multiply_codes(self, x: Tensor) -> Tensor:
        static = slots.seen_scales(self, x, "input", self.rule.activation)
        cached = not sharded.gathered(self) and self.training
        if cached and not (torch.compiler.is_compiling() or cannot_cache(self.weight)):
            pair: Any = self.weight_grid, self.rule.activation
            return multiply_shared(x, self.weight, self.bias, pair, self.rule.ste, taker=self, **static)
        grids = self.grid_name, self.slot_names["input"]
        return products.multiply_codes(x, self.weight, self.bias, grids, self.rule.ste, cached=cached, **static)
