"""MLX's own affine quantiser, as `mx.quantize` of mlx 0.32.4 computes it on a CPU, in torch: a peer's grid, for recover.py.

For each group: the edge is the extreme of larger magnitude; the step spans the group in 2^bits - 1 parts and points away from the
edge; it is then stretched so that the edge is a whole number of steps from zero. A value is code * scale + bias. This is not one
of qkit's grids: biases are no whole numbers of scales. A test holds it to `mx.quantize`, bit for bit, where MLX is installed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1e-7


def affine(w: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., n], scales and biases [..., n // group] of float32 `w` [..., n]."""
    x = w.unflatten(-1, (-1, group))
    low, high = x.amin(-1), x.amax(-1)
    top = torch.full_like(low, 2.0**bits - 1)  # a tensor, so that CUDA divides and does not multiply
    step = torch.clamp_min((high - low) / top, SMALLEST)
    downwards = low.abs() > high.abs()
    step, edge = torch.where(downwards, step, -step), torch.where(downwards, low, high)
    whole = torch.round(edge / step)
    scales = torch.where(whole != 0, edge / torch.where(whole != 0, whole, 1.0), step)
    biases = torch.where(whole != 0, edge, 0.0)
    codes = torch.clamp(torch.round((x - biases[..., None]) / scales[..., None]), 0, 2**bits - 1)
    return codes.flatten(-2), scales, biases


def affine_values(w: Tensor, *, bits: int, group: int) -> Tensor:
    """The values that MLX decodes after it quantized `w`."""
    codes, scales, biases = affine(w, bits=bits, group=group)
    x = codes.unflatten(-1, (-1, group)) * scales[..., None] + biases[..., None]
    return x.flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, bits, group):  # type: ignore[no-untyped-def]
        return affine_values(w, bits=bits, group=group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None, None


class AffineLinear(nn.Linear):
    """A linear layer that trains on MLX's affine grid."""

    bits = 4
    group = 64

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _StraightThrough.apply(self.weight.float(), self.bits, self.group), self.bias)


def prepare_affine(model: nn.Module) -> nn.Module:
    """`model` with its linear layers, but for the head, on MLX's affine grid; in place."""
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and not name.endswith("lm_head"):
            layer.__class__ = AffineLinear
    return model


def convert_affine(model: nn.Module) -> nn.Module:
    """`model` with the values that MLX's affine quantiser gives the weights of its linear layers, but for the head; in place."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
                layer.weight.copy_(affine_values(layer.weight, bits=AffineLinear.bits, group=AffineLinear.group))
                layer.__class__ = nn.Linear
    return model
