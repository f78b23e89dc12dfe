"""torch modules: layers that train on their grid, and layers that hold codes. They swap in for Linear and Embedding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.recipe import Rule
from qkit_torchao import lowering, ops

PLAIN = ("weight", "scales", "zeros", "tensor_scale")  #: buffers of a converted layer that holds no torchao tensor


class FakeLinear(nn.Linear):
    """A linear layer that computes with its weight's quantized values, and its input's if the rule has an activation grid.

    `weight` and `bias` are the parameters of the layer it replaces; the gradient of the quantized weight is that of `weight`.
    """

    rule: Rule
    values: "Values"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return F.linear(_activation(x, self.rule), self.values(self.weight, dtype), self.bias)

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
        weight = self.values(self.weight, self.weight.dtype)
        return F.embedding(tokens, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)

    def train(self, mode: bool = True) -> "FakeEmbedding":
        """As any module; besides, the quantized values are made anew at the next use."""
        self.values.drop()
        return super().train(mode)


class PackedLinear(nn.Linear):
    """A linear layer that holds codes: in a torchao tensor, or in plain arrays that are decoded at every call.

    Not trainable. `execution` says how it runs.
    """

    rule: Rule
    execution: str
    native: bool
    dtype: DType

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        weight = self.weight if self.native else ops.dequantize(unpack(self))
        return F.linear(_activation(x, self.rule), weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves the codes and keeps the scales as they are: a cast changes only the type that values are rounded to."""
        _apply_to_packed(self, fn, recurse)
        return self


class PackedEmbedding(nn.Embedding):
    """An embedding that holds codes; the rows of the tokens it sees are decoded, not the table."""

    rule: Rule
    execution: str
    dtype: DType

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        return ops.dequantize(_rows(unpack(self), tokens))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        """As `PackedLinear._apply`."""
        _apply_to_packed(self, fn, recurse)
        return self


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

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` on the grid, rounded to `dtype`; differentiable, straight through."""
        if _cannot_keep(weight):
            return ops.fake_quantize(weight, self.grid).to(dtype)
        stamp = (weight._version, weight.data_ptr(), weight.dtype, dtype, weight.device, _steps_taken)
        if stamp != self._stamp or self._made is None:
            with torch.inference_mode(False):  # or what is kept could not be trained with later
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


def _cannot_keep(weight: Tensor) -> bool:
    """Where there is no version counter or address to tell a change by: traced, transformed and inference tensors."""
    if torch.compiler.is_compiling():
        return True
    return weight.is_inference() or bool(torch._C._functorch.is_functorch_wrapped_tensor(weight))


class _PassGradient(torch.autograd.Function):
    """Stands for `made` going forward and for `weight` going back."""

    @staticmethod
    def forward(weight: Tensor, made: Tensor) -> Tensor:
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

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
    made = _become(module, PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear)
    made.__dict__.pop("values", None)
    made._parameters.pop("weight", None)
    made.rule = rule
    _hold(made, q)
    return made


def unpack(module: Any) -> QTensor[Tensor]:
    """The codes and scales of a converted layer."""
    grid = module.rule.weight
    if isinstance(module.weight, nn.Parameter):
        return lowering.container_of(module.weight).raised(module.weight, grid, module.dtype)
    codes = lowering.unpair(module.weight) if _in_pairs(grid) else module.weight
    parts = {name: getattr(module, name, None) for name in ("scales", "zeros", "tensor_scale")}
    return QTensor(codes, grid=grid, dtype=module.dtype, **parts)


def _hold(made: Any, q: QTensor[Tensor]) -> None:
    """Puts `q` into a layer that holds nothing yet."""
    held = None if isinstance(made, nn.Embedding) else lowering.container_for(q)
    made.dtype = q.dtype
    if held is None:
        made.native = False
        made.execution = "decoded by the row" if isinstance(made, nn.Embedding) else "decoded first"
        codes = lowering.pairs(q.codes) if _in_pairs(q.grid) else q.codes
        for name, array in zip(PLAIN, (codes, q.scales, q.zeros, q.tensor_scale), strict=True):
            if array is not None:
                made.register_buffer(name, array)
        return
    made.native = held.native
    made.execution = f"torchao {held.name}" + ("" if held.native else ", decoded first")
    made.register_parameter("weight", nn.Parameter(held.lower(q), requires_grad=False))


def _in_pairs(grid: Grid) -> bool:
    """Whether codes are held two to a byte, as rows of even width can be."""
    return grid.element.name == "e2m1" and isinstance(grid.group, int) and grid.group % 2 == 0


def _apply_to_packed(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    q = unpack(module)
    probe = fn(torch.zeros((), dtype=ops.DTYPE[q.dtype], device=q.codes.device))
    moved = replace(q.map(lambda array: array.to(probe.device)), dtype=dtype_of(probe))
    for name in PLAIN:
        module._buffers.pop(name, None)
    module._parameters.pop("weight", None)
    nn.Module._apply(module, fn, recurse)
    _hold(module, moved)


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
