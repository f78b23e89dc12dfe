"""Prepared layers: they train on their grid, and swap in for Linear and Embedding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.engines.layer import Mode
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.qtensor import dtype_of
from qkit.reference.ranges import static_names
from qkit.rules import Rule
from qkit_torchao.arithmetic import ranges, rounding
from qkit_torchao.cache import codes, values
from qkit_torchao.layers import gates, operators, products, sharded, straight_through
from qkit_torchao.layers.execution import why_no_kernel


class _Prepared(nn.Module):
    """What prepared layers share: a rule, ranges of static activations, and a gate.

    The gate is a tensor, so that compiled code obeys it without being compiled anew, unless some layers are switched and others
    not; in eager mode `mode` is asked, so that nothing waits for the device. Layers in one mode share one gate, and compiled code
    quantizes an input once for all that share both. `grid_name` and `slot_names` are grids as text, as compiled code wants them.
    """

    rule: Rule
    kind: str
    grid_name: str
    slot_names: dict[str, str]
    weight: Tensor
    gate: Tensor
    room: Tensor | None
    mode: Mode
    calibrating: bool
    holding: bool
    simple: bool

    @property
    def weight_grid(self) -> Grid:
        """The grid of the weight, which every rule of a prepared layer has."""
        assert self.rule.weight is not None
        return self.rule.weight

    def train(self, mode: bool = True) -> Any:
        """As any module; besides, the quantized values are made anew at the next use."""
        values.drop(self.weight)
        return super().train(mode)

    def switch(self, mode: Mode) -> None:
        """See `qkit.engines.protocol.Backend.switch`."""
        self.mode, self.calibrating = mode, mode == "calibrating"
        _settle(self)
        self.gate = gates.of(self.gate.device, on=mode != "off")
        if self.holding:
            (values.release if mode == "off" else values.hold)(self.weight)

    def hold(self, on: bool) -> None:
        """See `qkit.engines.protocol.Backend.hold`."""
        unseen = sharded.is_managed(self) or _cannot_keep(self.weight)
        if on and (unseen or self.kind):
            why = "are gathered or cannot be watched" if unseen else "may be multiplied as codes"
            raise BackendError(
                f"values on {self.weight_grid} cannot be held, since these weights {why}: use interval 1"
            )
        self.holding = on
        _settle(self)
        (values.hold if on and self.mode != "off" else values.release)(self.weight)

    def regrid(self, rule: Rule) -> None:
        """See `qkit.engines.protocol.Backend.regrid`."""
        _put_on(self, rule)
        _settle(self)
        (values.hold if self.holding and self.mode != "off" else values.release)(self.weight)

    def forget(self) -> None:
        """See `qkit.engines.protocol.Backend.forget`."""
        for name in static_names(self.rule):
            self.get_buffer(f"{name}_range").copy_(torch.tensor(ranges.EMPTY))

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """The weight's quantized values in `dtype`, or the weight where the layer is switched off."""
        return self._values(self.weight, dtype, kept=not sharded.is_gathered(self))

    def _values(self, weight: Tensor, dtype: torch.dtype, *, kept: bool) -> Tensor:
        grid, ste = self.weight_grid, self.rule.ste
        if torch.compiler.is_compiling():
            if self.training and self.holding:
                return operators.held(weight, self.gate, self.grid_name, ste, dtype)
            return torch.where(self.gate, straight_through.fake_quantize(weight, grid, ste=ste), weight).to(dtype)
        if self.mode == "off":
            return weight.to(dtype)
        if not kept or _cannot_keep(weight) or (self.holding and not self.training):
            return straight_through.fake_quantize(weight, grid, ste=ste).to(dtype)
        room = self.room
        room = room if room is not None and room.dtype == dtype and values.owns(weight, room) else None
        made = values.of(weight, grid, self.gate, dtype, into=room)
        return straight_through.stand_in(weight, made, grid, ste=ste)

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
        if self.rule.range == "dynamic":
            return straight_through.shared(x, grid, ste=self.rule.ste)
        given = self._scales(x, name, grid)
        return x if self.calibrating else straight_through.fake_quantize(x, grid, ste=self.rule.ste, **given)

    def _scales(self, x: Tensor, name: str, grid: Grid | None) -> dict[str, Any]:
        """`scales` and `zeros` for `fake_quantize`, where the slot is static, after a look at `x`; else empty."""
        if self.rule.range == "dynamic" or grid is None:
            return {}
        seen = self.get_buffer(f"{name}_range")
        if not x.numel():
            pass  # nothing is seen
        elif self.calibrating:
            seen.copy_(ranges.wider(seen, ranges.extremes(x)))
        elif self.training and self.rule.range == "average":
            seen.copy_(torch.where(self.gate, ranges.averaged(seen, ranges.extremes(x)), seen))
        q = rounding.quantize(seen, grid)
        scales = rounding.scale_values(q) + rounding.poison(rounding.amax(seen))  # NaN, as long as nothing was seen
        return {"scales": scales, "zeros": q.zeros}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As any module; a float model's checkpoint has no ranges, and leaves them as they are."""
        for name in static_names(self.rule):
            state_dict.setdefault(f"{prefix}{name}_range", self.get_buffer(f"{name}_range"))
        super()._load_from_state_dict(state_dict, prefix, *more)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any module; a copy has its own room."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_room()

    def _make_room(self) -> None:
        self.room = None if self.room is None else values.room(self.weight, self.weight_grid, self.gate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but keeps ranges in float32; the gate is that of the new device."""
        apply_but_keep(self, fn, recurse, [f"{name}_range" for name in static_names(self.rule)])
        self.gate = gates.of(self.gate.device, on=self.mode != "off")
        self._make_room()
        _reserve(self)
        return self


class FakeLinear(_Prepared, nn.Linear):
    """A linear layer that computes with its weight's quantized values, and its input's and output's if the rule has grids.

    `weight` and `bias` are the parameters of the layer it replaces; the gradient of the quantized weight is that of `weight`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        if (made := self._standing()) is not None:
            return self._with(x, made)
        weight = self.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        y = self._product(x) if self.kind and self._multiplies_codes(x) else self._values_product(x, weight, dtype)
        return self.slot(y, "output", self.rule.output)

    def _standing(self) -> Tensor | None:
        """The values that were made of the weight, if they may be used as they are, and a short way there is all that is needed.

        For eager training on a slow host: what is asked here is what can change between two calls.
        """
        if torch.compiler.is_compiling() or not self.simple or torch._C._is_any_autocast_enabled():
            return None
        weight, gate = self._parameters.get("weight"), self._buffers["gate"]
        assert gate is not None
        if weight is None or sharded.is_managed(self) or _cannot_keep(weight):  # none, where something computes it
            return None
        return values.standing(weight, self.weight_grid, gate, self.room)

    def _with(self, x: Tensor, made: Tensor) -> Tensor:
        """The output for `made`, the values of the weight."""
        rule, weight = self.rule, self._parameters["weight"]
        assert weight is not None
        assert rule.weight is not None
        before = x.shape[:-1]
        if rule.activation is not None:
            x = straight_through.shared(x, rule.activation, ste=rule.ste, rows=True)
        y = straight_through.linear(x, weight, made, self.bias, rule.weight, ste=rule.ste)
        if len(before) + 1 != y.dim():
            y = y.view(*before, y.shape[-1])
        return y if rule.output is None else straight_through.shared(y, rule.output, ste=rule.ste)

    def _values_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.slot(x, "input", self.rule.activation)
        gathered = sharded.is_gathered(self)
        if gathered:
            self.room = None  # it is of the size of the whole weight
        if gathered or (torch.compiler.is_compiling() and not (self.holding and not self.training)):
            options = self.gate, self.weight_grid, self.grid_name, self.rule.ste, dtype
            return operators.linear(x, weight, self.bias, *options, kept=not gathered, room=self.room)
        return F.linear(x, self._values(weight, dtype, kept=True), self.bias)

    def _multiplies_codes(self, x: Tensor) -> bool:
        """Whether a kernel will multiply codes of both sides once the layer is converted, so that training must, too.

        Here a switch is asked for by Python, and compiled code follows by compiling once more: products of integers and of
        floats are two kernels, and no tensor chooses between them.
        """
        if self.weight.device.type != "cuda":
            return False
        if self.mode != "on" or x.dtype != self.weight.dtype or not x.numel():
            return False
        shape = (self.out_features, self.in_features)
        return not why_no_kernel(self.rule, device=x.device, dtype=dtype_of(x), shape=shape)

    def _product(self, x: Tensor) -> Tensor:
        given = self._scales(x, "input", self.rule.activation)
        kept = not sharded.is_gathered(self)
        grids = self.grid_name, self.slot_names["input"]
        return products.linear(x, self.weight, self.bias, grids, self.rule.ste, kept=kept, **given)


class FakeEmbedding(_Prepared, nn.Embedding):
    """An embedding that looks up its weight's quantized values; see `FakeLinear`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        held = self.training and self.holding
        if torch.compiler.is_compiling() and self.weight_grid.by_rows and not held:
            rows = F.embedding(tokens, self.weight, *options)
            on_grid = straight_through.fake_quantize(rows, self.weight_grid, ste=self.rule.ste)
            return torch.where(self.gate, on_grid, rows)
        return F.embedding(tokens, self.weight_values(self.weight.dtype), *options)


def fake(module: nn.Module, rule: Rule, cls: type[nn.Module] | None = None) -> Any:
    """The training form of a float Linear or Embedding: same parameters, hooks and mode, other class."""
    assert rule.weight is not None
    made = become(module, cls or (FakeEmbedding if isinstance(module, nn.Embedding) else FakeLinear))
    _put_on(made, rule)
    device = made.weight.device
    made.register_buffer("gate", gates.of(device, on=True), persistent=False)
    for name in static_names(rule):
        made.register_buffer(f"{name}_range", torch.tensor(ranges.EMPTY, device=device))
    made.mode, made.calibrating, made.holding = "on", False, False
    _settle(made)
    made.room = values.room(made.weight, rule.weight, made.gate) if cls is None else None
    _reserve(made)
    return made


def _reserve(layer: Any) -> None:
    """Has codes made before a graph is captured, for layers that multiply them; see `codes.of`."""
    if layer.weight.is_cuda and layer.kind:
        codes.of(layer.weight, layer.weight_grid)


def _put_on(layer: Any, rule: Rule) -> None:
    assert rule.weight is not None
    layer.rule, layer.grid_name, layer.kind = rule, str(rule.weight), products.kind(rule.weight, rule.activation)
    layer.slot_names = {"input": str(rule.activation), "output": str(rule.output)}


def _settle(layer: Any) -> None:
    """Works out what does not change between two calls: whether the layer does nothing but multiply dynamic values."""
    layer.simple = layer.mode == "on" and not (layer.holding or layer.kind) and layer.rule.range == "dynamic"


def become(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of another class with the parameters, buffers, hooks and mode of `module`."""
    made = cls.__new__(cls)
    made.__dict__.update(
        {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in module.__dict__.items()}
    )
    return made


def apply_but_keep(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool, names: list[str]) -> None:
    """`Module._apply`, but for the type of the buffers `names`, which only follow to the device."""
    kept = {name: module.get_buffer(name) for name in names}
    nn.Module._apply(module, fn, recurse)
    for name, buffer in kept.items():
        device = module.get_buffer(name).device
        if device.type != "meta" and buffer.device.type != "meta":
            module._buffers[name] = buffer.to(device)


def _cannot_keep(weight: Tensor) -> bool:
    """Whether no version tells the changes of `weight`, or what is kept may not be written: under torch.func's transforms."""
    return weight.is_inference() or straight_through.transformed()
