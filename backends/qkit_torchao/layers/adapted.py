"""Adapters on prepared and converted layers: they compute with the grid's value of the merged weight, and merge into it.

`qkit.reference.merged` is the law of the merged weight; functions here have its names. Exact in eager mode and compiled.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.element import MIN_SCALE
from qkit.reference.merged import DROPPED, Update
from qkit_torchao.arithmetic import rounding
from qkit_torchao.layers import converted, products, sharded, straight_through
from qkit_torchao.layers.converted import PackedLinear, PlainLinear
from qkit_torchao.layers.prepared import FakeLinear, become
from qkit_torchao.layers.slots import slot, static_scales

NAMES = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude"}  #: of parameters, by the names of `Update`


class _Adapted(nn.Module):
    """What adapted layers share: the parameters of the adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_scale: float

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'lora' if self.lora_magnitude is None else 'dora'}, rank {len(self.lora_A)}"

    def merge_into(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight of base `w` [outputs, inputs], in `dtype`."""
        merged: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
            w, self.lora_B, self.lora_A, self.lora_magnitude, self.lora_scale, dtype
        )
        return merged


class AdaptedLinear(_Adapted, FakeLinear):
    """A prepared layer with an adapter; `weight` is the base."""

    def merged(self) -> Tensor:
        """The merged weight [outputs, inputs], in the type of the base."""
        sharded.is_gathered(self)  # refuses one that was rounded
        return self.merge_into(self.weight, self.weight.dtype)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """The merged weight's quantized values in `dtype`, or itself where the layer is switched off."""
        merged = self.merged()
        if torch.compiler.is_compiling():
            return torch.where(self.gate, self._on_grid(merged), merged).to(dtype)
        return (merged if self.mode == "off" else self._on_grid(merged)).to(dtype)

    def _on_grid(self, merged: Tensor) -> Tensor:
        return straight_through.fake_quantize(merged, self.weight_grid, ste=self.rule.ste)

    def _values_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(self.slot(x, "input", self.rule.activation), self.weight_values(dtype), self.bias)

    def _product(self, x: Tensor) -> Tensor:
        given = self._scales(x, "input", self.rule.activation)
        return products.linear(
            x, self.merged(), self.bias, (self.grid_name, self.slot_names["input"]), self.rule.ste, **given
        )


class AdaptedPacked(_Adapted, PackedLinear):
    """A converted layer with an adapter: its codes are the base, decoded in each forward."""

    def merged(self) -> Tensor:
        """The merged weight [outputs, inputs], in float32."""
        return self.merge_into(rounding.dequantize(replace(converted.unpack(self), dtype="float32")), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]: what the layer will give once merged, straight through for the gradient."""
        grid, activation, merged = self.rule.weight, self.rule.activation, self.merged()
        assert grid is not None
        if activation and self.execution.multiply and x.numel():
            given = static_scales(self, "input", activation)
            y = products.linear(x, merged, self.bias, (str(grid), str(activation)), self.rule.ste, **given)
        else:
            values = straight_through.fake_quantize(merged, grid, ste=self.rule.ste).to(rounding.DTYPE[self.dtype])
            y = F.linear(slot(self, x, "input", activation), values, self.bias)
        return slot(self, y, "output", self.rule.output)


class AdaptedPlain(AdaptedPacked, PlainLinear):
    """`AdaptedPacked` on plain arrays."""


def adapt(module: Any, update: Update) -> Any:
    """See `Backend.adapt`."""
    if isinstance(module, PackedLinear):
        made = become(module, AdaptedPlain if isinstance(module, PlainLinear) else AdaptedPacked)
    else:
        made = become(module, AdaptedLinear)
        made.room = None
    device = module.weight.device
    for name, own in NAMES.items():
        array = update.parts().get(name)
        trained = None if array is None else nn.Parameter(torch.tensor(array, device=device))
        made.register_parameter(own, trained)
    made.lora_scale = update.scale
    return made


def update(module: Any) -> Update:
    """See `Backend.update`."""
    a, b, magnitude = (
        None if one is None else one.detach().float().cpu().numpy().copy()
        for one in (module.lora_A, module.lora_B, module.lora_magnitude)
    )
    assert a is not None
    assert b is not None
    return Update(a, b, module.lora_scale, magnitude)


def merged(module: Any) -> Any:
    """See `Backend.merged`."""
    with torch.no_grad():
        weight = module.merged()
    if isinstance(module, AdaptedPacked):
        assert module.rule.weight is not None
        q = replace(rounding.quantize(weight, module.rule.weight), dtype=module.dtype)
        return _without_adapter(converted.pack(module, q, module.rule, static={}, owner=None))
    made = _without_adapter(become(module, FakeLinear))
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made.train(module.training)  # the values kept so far are the base's


def freeze(model: nn.Module) -> None:
    """See `Backend.freeze`."""
    kept = {id(one) for module in model.modules() if isinstance(module, _Adapted) for one in _parameters(module)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [one for name in NAMES.values() if (one := module._parameters[name]) is not None]


def _without_adapter(made: Any) -> Any:
    for name in NAMES.values():
        del made._parameters[name]
    del made.lora_scale
    return made


class _Merged(torch.autograd.Function):
    """The merged weight in a given type; the gradient passes through the shortening and the rounding as it comes."""

    @staticmethod
    def forward(w: Tensor, b: Tensor, a: Tensor, magnitude: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
        v = added(w, b, a, scale)
        return stored(v if magnitude is None else v * stretch(magnitude, row_norms(v))[:, None], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, b, a, magnitude, ctx.scale, _ = inputs
        ctx.dtype = w.dtype
        ctx.save_for_backward(b, a, *(() if magnitude is None else (w, magnitude)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        b, a, *more = ctx.saved_tensors
        to_v, to_magnitude = gradients[0].float(), None
        with torch.autocast(to_v.device.type, enabled=False):
            if more:
                w, magnitude = more
                v = added(w, b, a, ctx.scale)
                norms = row_norms(v)
                to_magnitude = ((to_v * v).sum(dim=1) / norms).to(magnitude.dtype)
                to_v = to_v * stretch(magnitude, norms)[:, None]
            to_b = ctx.scale * (to_v @ shorten(a.float()).T)
            to_a = shorten(b.float() * ctx.scale).T @ to_v
        to_w = to_v.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return to_w, to_b.to(b.dtype), to_a.to(a.dtype), to_magnitude, None, None


# The law, in torch


def added(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """V = W + scale * B A, in float32."""
    return w.float() + product(shorten(b.float() * scale), shorten(a.float()))


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A of shortened factors [outputs, rank] and [rank, inputs], summed from the first column of B to the last."""
    total = b[:, :1] * a[:1]
    for k in range(1, len(a)):
        total = torch.addcmul(total, b[:, k : k + 1], a[k : k + 1])
    return total


def row_norms(v: Tensor) -> Tensor:
    """Lengths [outputs] of the rows of `v`, shortened; at least 2^-96."""
    squares = shorten(v).square()
    n = 1 << (v.shape[1] - 1).bit_length()
    squares = F.pad(squares, (0, n - v.shape[1]))
    while n > 1:
        n //= 2
        squares = squares[:, :n] + squares[:, n:]
    return squares[:, 0].double().sqrt().float().clamp_min(MIN_SCALE)


def stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / norms. As the root above in float64, where an ulp more or less does not reach the float32 it is rounded to:
    torch's own roots in float32 are not those of IEEE, nor are a GPU's quotients once compiled.
    """
    return (magnitude.double() / norms.double()).float()


def shorten(x: Tensor) -> Tensor:
    """`x` with 12 significant bits, ties to even."""
    return _significant(x, DROPPED)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `x` rounded to `dtype`, also where a compiler takes a cast down and up again for nothing."""
    if dtype == torch.bfloat16:
        x = _significant(x, 16)
    elif dtype == torch.float16:
        x = torch.where(x.abs() < 2.0**-14, torch.round(x * 2.0**24) * 2.0**-24, _significant(x, 13))
    return x.to(dtype)


def _significant(x: Tensor, dropped: int) -> Tensor:
    u = rounding.bits(x.contiguous())
    return ((u + ((1 << dropped - 1) - 1) + ((u >> dropped) & 1)) & ~((1 << dropped) - 1)).view(torch.float32)
