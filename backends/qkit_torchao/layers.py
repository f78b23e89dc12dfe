"""torch modules: layers that train on their grid, and layers that hold codes. They swap in for Linear and Embedding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.recipe import Rule
from qkit_torchao import lowering, ops


class FakeLinear(nn.Linear):
    """A linear layer that computes with its weight's quantized values, and its input's if the rule has an activation grid.

    `weight` and `bias` are the parameters of the layer it replaces; the gradient of the quantized weight is that of `weight`.
    """

    rule: Rule
    values: "Values"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return F.linear(_activation(x, self.rule), self.values(self.weight), self.bias)

    def train(self, mode: bool = True) -> "FakeLinear":
        """As any module; besides, the quantized values are made anew at the next use."""
        self.values.drop()
        return super().train(mode)


class FakeEmbedding(nn.Embedding):
    """An embedding that looks up its weight's quantized values; see `FakeLinear`."""

    rule: Rule
    values: "Values"

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        weight = self.values(self.weight)
        return F.embedding(
            tokens, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    def train(self, mode: bool = True) -> "FakeEmbedding":
        """As any module; besides, the quantized values are made anew at the next use."""
        self.values.drop()
        return super().train(mode)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is a torchao tensor of codes; not trainable. `execution` says how it runs."""

    rule: Rule
    execution: str
    native: bool

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        held: Any = self.weight
        weight = held if self.native else held.dequantize()
        return F.linear(_activation(x, self.rule), weight, self.bias)


class PackedEmbedding(nn.Embedding):
    """An embedding that holds codes; the rows of the tokens it sees are decoded, not the table."""

    rule: Rule
    execution: str
    dtype: DType

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        return ops.dequantize(_rows(unpack(self), tokens))


class Values:
    """The quantized values of one weight, made when the weight has changed and used until it changes again.

    A change is seen by torch's version counter, by another storage, type or device, by any optimizer's step, and by `train()`
    and `eval()`. A write through `.data` outside of an optimizer is not; call `drop` after one. Copies and pickles are empty.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._stamp: tuple[Any, ...] = ()
        self._made: Tensor | None = None
        self._seen: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight` on the grid, in the type that the layer's product will run in; differentiable, straight through."""
        if (
            torch.compiler.is_compiling()
        ):  # the compiler fuses the rounding with its neighbours, and has no version counters
            return ops.fake_quantize(weight, self.grid)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        stamp = (weight._version, weight.data_ptr(), weight.dtype, dtype, weight.device, _steps_taken)
        if stamp != self._stamp or self._made is None:
            self._made = ops.rounded(weight.detach(), self.grid).to(dtype)
            self._seen = weight.detach()  # keeps the storage, so that its address is not given to another
            self._stamp = stamp
        result: Tensor = _PassGradient.apply(weight, self._made)  # type: ignore[no-untyped-call]
        return result

    def drop(self) -> None:
        """Forgets; the next use makes them anew."""
        self._stamp, self._made, self._seen = (), None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Values":
        return Values(self.grid)

    def __reduce__(self) -> tuple[Any, ...]:
        return Values, (self.grid,)


class _PassGradient(torch.autograd.Function):
    """Stands for `made` going forward and for `weight` going back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, made: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


_steps_taken = 0
_hook: Any = None


def _count_step(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1


def fake(module: nn.Module, rule: Rule) -> Any:
    """The training form of a float Linear or Embedding: same parameters, hooks and mode, other class."""
    assert rule.weight is not None
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_count_step)
    made = _become(module, FakeEmbedding if isinstance(module, nn.Embedding) else FakeLinear)
    made.rule, made.values = rule, Values(rule.weight)
    return made


def pack(module: nn.Module, q: QTensor[Any], rule: Rule) -> Any:
    """The deployed form of a Linear or Embedding, float or prepared, holding the codes of `q`."""
    embedding = isinstance(module, nn.Embedding)
    made = _become(module, PackedEmbedding if embedding else PackedLinear)
    made.__dict__.pop("values", None)
    made._parameters.pop("weight", None)
    made.rule = rule
    if embedding:
        made.dtype, made.weight = q.dtype, None
        for name, array in q.parts().items():
            made.register_buffer(name, array)
        made.execution = "decoded by the row"
        return made
    held = lowering.container_for(q)
    made.native = held.native
    made.register_parameter("weight", nn.Parameter(held.lower(q), requires_grad=False))
    made.execution = f"torchao {held.name}" + ("" if held.native else ", decoded first")
    return made


def unpack(module: Any) -> QTensor[Tensor]:
    """The codes and scales of a converted layer."""
    grid = module.rule.weight
    if isinstance(module, PackedEmbedding):
        parts = {name: getattr(module, name, None) for name in ("codes", "scales", "zeros", "tensor_scale")}
        return QTensor(grid=grid, dtype=module.dtype, **parts)
    return lowering.container_of(module.weight).raised(module.weight, grid, dtype_of(module.weight))


def _become(module: nn.Module, cls: type[nn.Module]) -> Any:
    made = cls.__new__(cls)
    made.__dict__.update(
        {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    )
    return made


def _activation(x: Tensor, rule: Rule) -> Tensor:
    return ops.fake_quantize(x, rule.activation) if rule.activation else x


def _rows(q: QTensor[Tensor], tokens: Tensor) -> QTensor[Tensor]:
    """The rows of `q` [vocabulary, width] that `tokens` [...] name."""
    one = (1,) * (tokens.dim() + 1)
    return q.map(
        lambda array: array if array.dim() == 0 else array[tokens] if len(array) == len(q.codes) else array.reshape(one)
    )
