"""The weights of converted experts, as transformers' implementations of experts use tensors: decoded when they are used.

Few rows on a GPU are multiplied by the codes. For more, one expert after the other is decoded. The gradient of a product with
frozen experts decodes again, so that nothing decoded waits for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.qtensor import DType
from qkit_torchao.arithmetic import rounding
from qkit_torchao.layers.stacks import Stack

GROUPED = (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
MULTIPLY = (torch.matmul, torch.mm, Tensor.__matmul__, Tensor.matmul, Tensor.mm)


class Codes(Protocol):
    """The part of converted experts that their weights need."""

    dtype: DType

    @property
    def adapter(self) -> str:
        """Kind and rank of the adapters, if any."""
        ...

    def get_buffer(self, target: str) -> Tensor:
        """As of any module."""
        ...

    def decoded(self, stack: Stack, expert: int) -> Tensor:
        """The weight of one expert, laid out as in the parameter of `stack`."""
        ...

    def multiplies(self, x: Tensor, stack: Stack) -> bool:
        """Whether `multiply_rows` takes x [rows, inputs]."""
        ...

    def multiply_rows(self, x: Tensor, stack: Stack, experts: Tensor) -> Tensor:
        """x [rows, inputs] times the codes of the expert of each row -> [rows, outputs of all projections]."""
        ...


class _Lazy:
    """Something that other code takes for a tensor, and that is decoded as a whole where nothing better is known."""

    def __init__(self, layer: Codes, stack: Stack, *, swapped: bool = False) -> None:
        self._layer, self._stack, self._swapped = layer, stack, swapped

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        return rounding.DTYPE[self._layer.dtype]

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self._layer.get_buffer(f"{self._stack.projections[0]}_codes").device

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        _, outputs, inputs = self._stack.shape
        outputs *= len(self._stack.projections)
        return torch.Size((inputs, outputs) if self._inputs_first else (outputs, inputs))

    def whole(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    def product(self, function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """The result of `function` where it is a product that needs no more than the experts in it; None where it is not."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Anything else that a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @property
    def _inputs_first(self) -> bool:
        return self._stack.transposed != self._swapped

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        for one in args:
            if isinstance(one, _Lazy) and (made := one.product(function, args, named)) is not None:
                return made
        plain = [one.whole() if isinstance(one, _Lazy) else one for one in args]
        return function(*plain, **{key: one.whole() if isinstance(one, _Lazy) else one for key, one in named.items()})


class Decoded(_Lazy):
    """The weights of all experts of a stack. A grouped product decodes the experts that have tokens, one at a time."""

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        return torch.Size((self._stack.shape[0], *super().shape))

    def __getitem__(self, index: Any) -> Any:
        """The weight of one expert, or those of several that a tensor names."""
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
            return Chosen(self._layer, self._stack, index, swapped=self._swapped)
        if isinstance(index, int) or (isinstance(index, Tensor) and not index.dim()):
            return One(self._layer, self._stack, int(index), swapped=self._swapped)
        return self.whole()[index]

    def transpose(self, one: int, other: int) -> Any:
        """The two last axes swapped."""
        if {one % 3, other % 3} != {1, 2}:
            return self.whole().transpose(one, other)
        return Decoded(self._layer, self._stack, swapped=not self._swapped)

    def whole(self) -> Tensor:
        """All experts as one tensor."""
        return torch.stack([self[expert].whole() for expert in range(self.shape[0])])

    def product(self, function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """A grouped product of rows that are sorted by expert."""
        if function not in GROUPED or len(args) < 2 or args[1] is not self or "offs" not in named:
            return None
        if not self._inputs_first:
            return None
        x, ends = args[0].to(self.dtype), named["offs"]
        return _multiply(
            self._layer, self._stack, x, torch.bucketize(torch.arange(len(x), device=x.device), ends, right=True)
        )


class Chosen(_Lazy):
    """The weights [rows, ...] of the experts that a tensor names, as `batched_mm` takes them."""

    def __init__(self, layer: Codes, stack: Stack, experts: Tensor, *, swapped: bool) -> None:
        super().__init__(layer, stack, swapped=swapped)
        self._experts = experts

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return torch.Size((len(self._experts), *super().shape))

    def whole(self) -> Tensor:
        """Each expert decoded once, and copied for each of its rows."""
        chosen, places = self._experts.unique(return_inverse=True)
        each = [One(self._layer, self._stack, int(expert), swapped=self._swapped).whole() for expert in chosen.tolist()]
        return torch.stack(each)[places]

    def product(self, function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """A batched product with one row for each expert."""
        if function is not torch.bmm or named or len(args) != 2:
            return None
        first = args[0] is self
        x = args[1] if first else args[0]
        axis = 2 if first else 1  # a column after the weights, or a row before them
        if not isinstance(x, Tensor) or x.shape[axis] != 1 or first == self._inputs_first:
            return None
        rows = x.squeeze(axis).to(self.dtype)
        if x.device.type == "cpu" and not self._layer.multiplies(rows, self._stack):
            return (
                None  # there the sums of `torch.bmm` depend on the count of rows, and prepared experts have all of them
            )
        return _multiply(self._layer, self._stack, rows, self._experts).unsqueeze(axis)


class One(_Lazy):
    """The weight of one expert."""

    def __init__(self, layer: Codes, stack: Stack, expert: int, *, swapped: bool) -> None:
        super().__init__(layer, stack, swapped=swapped)
        self._expert = expert

    def whole(self) -> Tensor:
        """The weight."""
        weight = self._layer.decoded(self._stack, self._expert)
        return weight.transpose(-1, -2) if self._swapped else weight

    def t(self) -> "One":
        """The weight transposed."""
        return One(self._layer, self._stack, self._expert, swapped=not self._swapped)

    T = mT = property(t)

    def transpose(self, one: int, other: int) -> "One":
        """The weight transposed; a weight has two axes."""
        return self if one % 2 == other % 2 else self.t()

    def product(self, function: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """A linear layer, or a product after rows of inputs."""
        if len(args) < 2 or args[1] is not self or not isinstance(args[0], Tensor):
            return None
        linear = function is F.linear
        if not (linear or (function in MULTIPLY and not named)) or linear == self._inputs_first:
            return None
        x = args[0]
        experts = torch.full((x[..., 0].numel(),), self._expert, device=x.device)
        y = _multiply(self._layer, self._stack, x.reshape(-1, x.shape[-1]), experts).reshape(*x.shape[:-1], -1)
        bias = args[2] if len(args) > 2 else named.get("bias")
        return y if bias is None else y + bias


def _multiply(layer: Codes, stack: Stack, x: Tensor, experts: Tensor) -> Tensor:
    """x [rows, inputs] times the weight of the expert of each row -> [rows, outputs]; experts past the last give zeros."""
    if layer.adapter:  # whose factors have gradients, too
        return _one_by_one(layer, stack, x, experts)
    y: Tensor = _Product.apply(x, experts, layer, stack)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """The product with frozen experts. Backward decodes the experts again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: Tensor, layer: Codes, stack: Stack) -> Tensor:
        ctx.layer, ctx.stack, ctx.dtype = layer, stack, x.dtype
        ctx.save_for_backward(experts)
        if layer.multiplies(x, stack):
            return layer.multiply_rows(x, stack, experts)
        return _one_by_one(layer, stack, x, experts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (experts,) = ctx.saved_tensors
        gradient, stack = gradients[0], ctx.stack
        out = gradient.new_zeros(len(gradient), stack.shape[2])
        for expert, rows in _rows_of(experts, stack):
            weight = ctx.layer.decoded(stack, expert).to(gradient.dtype)
            out[rows] = gradient[rows] @ (weight.t() if stack.transposed else weight)
        return out.to(ctx.dtype), None, None, None


def _one_by_one(layer: Codes, stack: Stack, x: Tensor, experts: Tensor) -> Tensor:
    parts, places = [], []
    for expert, rows in _rows_of(experts, stack):
        weight = layer.decoded(stack, expert)
        parts.append(x[rows] @ (weight if stack.transposed else weight.t()).to(x.dtype))
        places.append(rows)
    outputs = stack.shape[1] * len(stack.projections)
    if not parts:
        return x.new_zeros(len(x), outputs)
    if len(parts) == 1 and len(places[0]) == len(x):
        return parts[0]
    return x.new_zeros(len(x), outputs).index_copy(0, torch.cat(places), torch.cat(parts))


def _rows_of(experts: Tensor, stack: Stack) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, and these rows. The host waits for the device once."""
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=stack.shape[0]).tolist()
    begin = 0
    for expert, count in enumerate(counts[: stack.shape[0]]):
        if count:
            yield expert, order[begin : begin + count]
        begin += count
