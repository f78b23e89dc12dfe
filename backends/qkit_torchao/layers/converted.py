"""Converted layers: their codes are in a torchao tensor or in plain arrays, and are not trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference.ranges import static_contents
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import Laid, lay, unpair
from qkit_torchao.kernels import choose
from qkit_torchao.layers import containers
from qkit_torchao.layers.become import apply_but_keep, become, forget_preparation
from qkit_torchao.layers.decoded import decoded
from qkit_torchao.layers.execution import Execution, choose_execution
from qkit_torchao.layers.scaled_embedding import scaled
from qkit_torchao.layers.slots import slot
from qkit_torchao.torch_private import parameter, remove_buffers, remove_parameters

PLAIN = ("codes", "scales", "zeros", "tensor_scale")  #: buffers of a converted layer that has no torchao tensor


class PackedLinear(nn.Linear):
    """A linear layer of codes. `execution` says how they are multiplied.

    Attributes:
        owner: the embedding or linear layer, in a tuple, that this one shares its codes with; empty where there is none.
    """

    rule: Rule
    execution: Execution
    dtype: DType
    owner: tuple[nn.Module, ...]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        y = self.execution.multiply(self, x) if self.execution.multiply and x.numel() else self._decoded(x)
        return slot(self, y, "output", self.rule.output)

    def _decoded(self, x: Tensor) -> Tensor:
        weight = self.weight if self.execution.takes_floats else rounding.dequantize(unpack(self))
        return F.linear(slot(self, x, "input", self.rule.activation), weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves the codes and keeps the scales as they are: a cast changes only the type that values are rounded to."""
        _apply_to_packed(self, fn, recurse)
        return self


class PlainLinear(PackedLinear):
    """A `PackedLinear` whose codes are plain arrays. `weight` is their values, for code that reads its type or shape."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [outputs, inputs], decoded at every call; they refuse to be written."""
        return decoded(rounding.dequantize(unpack(self)))


class PackedEmbedding(nn.Embedding):
    """An embedding of codes. It decodes the rows of the tokens that it sees, not the table."""

    rule: Rule
    execution: Execution
    dtype: DType
    owner: tuple[nn.Module, ...]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        return scaled(self, rounding.dequantize(_rows(unpack(self), tokens)))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [entries, width], decoded at every call; they refuse to be written."""
        return decoded(rounding.dequantize(unpack(self)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        """As `PackedLinear._apply`."""
        _apply_to_packed(self, fn, recurse)
        return self


def pack(
    module: nn.Module, q: QTensor[Any], rule: Rule, *, static: Mapping[str, Tensor], owner: nn.Module | None
) -> Any:
    """The deployed form of a Linear or Embedding, float or prepared, with the codes of `q`; see `Modules.pack`."""
    execution = choose_execution(rule, device=q.codes.device, dtype=q.dtype, shape=q.shape)
    return build(module, lay(q, execution.layout), rule, execution, static=static, owner=owner)


def build(
    module: nn.Module,
    laid: Laid,
    rule: Rule,
    execution: Execution,
    *,
    static: Mapping[str, Tensor],
    owner: nn.Module | None = None,
) -> Any:
    """As `pack`, with codes that are in the layout of `execution` already."""
    plain = PlainLinear if execution.container is None else PackedLinear  # on every device alike: the grid decides
    layer = become(module, PackedEmbedding if isinstance(module, nn.Embedding) else plain)
    forget_preparation(layer)
    remove_parameters(layer, "weight")
    layer.rule, layer.owner = rule, () if owner is None else (owner,)
    for name, array in static.items():
        layer.register_buffer(name, array)
    _put_in(layer, laid, execution)
    return layer


def deploy(layers: Sequence[tuple[Any, Rule, Mapping[str, Tensor]]]) -> list[Any | None]:
    """See `Deploys.deploy`; on a GPU. The host waits for the device once, to learn which weights are not finite."""
    built: list[Any | None] = [None] * len(layers)
    broken: dict[torch.device, Tensor] = {}
    for number, (module, rule, static) in enumerate(layers):
        w, grid = module.weight.detach(), rule.weight
        assert grid is not None
        if choose.lays_out(w, grid):
            if w.device not in broken:
                broken[w.device] = torch.zeros(len(layers), dtype=torch.int32, device=w.device)
            execution = choose_execution(rule, device=w.device, dtype=dtype_of(w), shape=tuple(w.shape))
            laid = choose.laid_out(w, grid, execution.layout, broken=broken[w.device], number=number)
            if laid is not None:
                built[number] = build(module, laid, rule, execution, static=static)
    wrong = {number for flags in broken.values() for number, flag in enumerate(flags.tolist()) if flag}
    return [None if number in wrong else one for number, one in enumerate(built)]


def unpack(module: Any) -> QTensor[Tensor]:
    """The codes and scales of a converted layer."""
    grid = module.rule.weight
    stored = parameter(module, "weight")
    if stored is not None:
        return containers.container_of(stored).read(stored, grid, module.dtype)
    codes = unpair(module.codes) if module.execution.layout == "pairs" else module.codes
    parts = {name: getattr(module, name, None) for name in ("scales", "zeros", "tensor_scale")}
    return QTensor(codes, grid=grid, dtype=module.dtype, **parts)


def _put_in(layer: Any, laid: Laid, execution: Execution) -> None:
    """Puts codes into a layer that has none yet."""
    layer.execution, layer.dtype = execution, laid.dtype
    if execution.container:
        layer.register_parameter("weight", nn.Parameter(execution.container.store(laid), requires_grad=False))
        return
    for name in PLAIN:
        if (array := getattr(laid, name)) is not None:
            layer.register_buffer(name, array)


def _apply_to_packed(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    q = unpack(module)
    probe = fn(torch.zeros((), dtype=rounding.DTYPE[q.dtype], device=q.codes.device))
    owners = [unpack(owner) for owner in module.owner]
    moved_owners = (own for own in owners if own.codes.device == probe.device)
    shared = next(moved_owners, q)  # arrays of the owner, once it has moved
    moved = replace(shared.map(lambda array: array.to(probe.device)), dtype=dtype_of(probe))
    remove_buffers(module, *PLAIN)
    remove_parameters(module, "weight")
    apply_but_keep(module, fn, recurse, list(static_contents(module.rule)))
    execution = choose_execution(module.rule, device=probe.device, dtype=moved.dtype, shape=moved.shape)
    _put_in(module, lay(moved, execution.layout), execution)


def _rows(q: QTensor[Tensor], tokens: Tensor) -> QTensor[Tensor]:
    """The rows of `q` [vocabulary, width] that `tokens` [...] name."""
    one = (1,) * (tokens.dim() + 1)
    return q.map(
        lambda array: array if array.dim() == 0 else array[tokens] if len(array) == len(q.codes) else array.reshape(one)
    )
