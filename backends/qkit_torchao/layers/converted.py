"""Converted layers: they hold codes, in a torchao tensor or in plain arrays, and are not trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference import learned
from qkit.reference.ranges import static_contents
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import Laid, lay, unpair
from qkit_torchao.kernels import choose
from qkit_torchao.layers import containers
from qkit_torchao.layers.execution import Execution, choose_execution
from qkit_torchao.layers.prepared import apply_but_keep, become
from qkit_torchao.layers.slots import slot

PLAIN = ("codes", "scales", "zeros", "tensor_scale")  #: buffers of a converted layer that holds no torchao tensor


class PackedLinear(nn.Linear):
    """A linear layer that holds codes. `execution` says what multiplies them.

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
    """A `PackedLinear` whose codes are plain arrays. `weight` is what they mean, for whoever asks for its type or shape."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [outputs, inputs], decoded at every call."""
        return rounding.dequantize(unpack(self))


class PackedEmbedding(nn.Embedding):
    """An embedding that holds codes; the rows of the tokens it sees are decoded, not the table."""

    rule: Rule
    execution: Execution
    dtype: DType
    owner: tuple[nn.Module, ...]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        return rounding.dequantize(_rows(unpack(self), tokens))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [entries, width], decoded at every call."""
        return rounding.dequantize(unpack(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        """As `PackedLinear._apply`."""
        _apply_to_packed(self, fn, recurse)
        return self


def pack(
    module: nn.Module, q: QTensor[Any], rule: Rule, *, static: Mapping[str, Tensor], owner: nn.Module | None
) -> Any:
    """The deployed form of a Linear or Embedding, float or prepared, holding the codes of `q`; see `Backend.pack`."""
    execution = choose_execution(rule, device=q.codes.device, dtype=q.dtype, shape=q.shape)
    return hold(module, lay(q, execution.layout), rule, execution, static=static, owner=owner)


def hold(
    module: nn.Module,
    laid: Laid,
    rule: Rule,
    execution: Execution,
    *,
    static: Mapping[str, Tensor],
    owner: nn.Module | None = None,
) -> Any:
    """`pack`, where the codes are laid out already as `execution` wants them."""
    plain = PlainLinear if execution.container is None else PackedLinear  # on every device alike: the grid decides
    made = become(module, PackedEmbedding if isinstance(module, nn.Embedding) else plain)
    for name in ("mode", "calibrating", "holding", "kind", "grid_name", "slot_names", "room"):
        made.__dict__.pop(name, None)
    for name in ("gate", "input_range", "output_range"):
        made._buffers.pop(name, None)
    made._non_persistent_buffers_set.discard("gate")
    for name in ("weight", *learned.NAMES):
        made._parameters.pop(name, None)
    made.rule, made.owner = rule, () if owner is None else (owner,)
    for name, array in static.items():
        made.register_buffer(name, array)
    _put_in(made, laid, execution)
    return made


def deploy(layers: Sequence[tuple[Any, Rule, Mapping[str, Tensor]]]) -> list[Any | None]:
    """See `Deployer.deploy`; on a GPU. The device is waited for once, to hear which weights are not finite."""
    made: list[Any | None] = [None] * len(layers)
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
                made[number] = hold(module, laid, rule, execution, static=static)
    wrong = {number for flags in broken.values() for number, flag in enumerate(flags.tolist()) if flag}
    return [None if number in wrong else one for number, one in enumerate(made)]


def unpack(module: Any) -> QTensor[Tensor]:
    """The codes and scales of a converted layer."""
    grid = module.rule.weight
    held = module._parameters.get("weight")
    if held is not None:
        return containers.container_of(held).raised(held, grid, module.dtype)
    codes = unpair(module.codes) if module.execution.layout == "pairs" else module.codes
    parts = {name: getattr(module, name, None) for name in ("scales", "zeros", "tensor_scale")}
    return QTensor(codes, grid=grid, dtype=module.dtype, **parts)


def _put_in(made: Any, laid: Laid, execution: Execution) -> None:
    """Puts codes into a layer that holds none yet."""
    made.execution, made.dtype = execution, laid.dtype
    if execution.container:
        made.register_parameter("weight", nn.Parameter(execution.container.lower(laid), requires_grad=False))
        return
    for name in PLAIN:
        if (array := getattr(laid, name)) is not None:
            made.register_buffer(name, array)


def _apply_to_packed(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    q = unpack(module)
    probe = fn(torch.zeros((), dtype=rounding.DTYPE[q.dtype], device=q.codes.device))
    owners = [unpack(owner) for owner in module.owner]
    shared = next(
        (own for own in owners if own.codes.device == probe.device), q
    )  # arrays of the owner, once it has moved
    moved = replace(shared.map(lambda array: array.to(probe.device)), dtype=dtype_of(probe))
    for name in PLAIN:
        module._buffers.pop(name, None)
    module._parameters.pop("weight", None)
    apply_but_keep(module, fn, recurse, list(static_contents(module.rule)))
    execution = choose_execution(module.rule, device=probe.device, dtype=moved.dtype, shape=moved.shape)
    _put_in(module, lay(moved, execution.layout), execution)


def _rows(q: QTensor[Tensor], tokens: Tensor) -> QTensor[Tensor]:
    """The rows of `q` [vocabulary, width] that `tokens` [...] name."""
    one = (1,) * (tokens.dim() + 1)
    return q.map(
        lambda array: array if array.dim() == 0 else array[tokens] if len(array) == len(q.codes) else array.reshape(one)
    )
