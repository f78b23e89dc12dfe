"""Converted layers: their codes are in a torchao tensor or in plain arrays, and are not trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.errors import StageError
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference.ranges import static_contents
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.merged import dithered
from qkit_torchao.arithmetic.packing import Laid, lay, unlay
from qkit_torchao.kernels import choose
from qkit_torchao.layers import containers
from qkit_torchao.layers.become import apply_but_keep, become, forget_preparation
from qkit_torchao.layers.decoded import decoded
from qkit_torchao.layers.execution import Execution, choose_execution
from qkit_torchao.layers.packed_product import Parts, decode_packed, spread_packed
from qkit_torchao.layers.scaled_embedding import scaled
from qkit_torchao.layers.shown import Shown
from qkit_torchao.layers.slots import slot
from qkit_torchao.torch_private import parameter, remove_buffers, remove_parameters, set_parameter

PLAIN = (
    "codes",
    "scales",
    "zeros",
    "tensor_scale",
    "biases",
)  #: buffers of a converted layer that has no torchao tensor


class _Packed(Shown):
    """The common part of converted layers.

    Attributes:
        owner: the embedding or linear layer, in a tuple, that this one shares its codes with; empty where there is none.
        grid_name: the weight's grid as text, which compiled code can pass on.
    """

    rule: Rule
    grid_name: str
    execution: Execution
    dtype: DType
    owner: tuple[nn.Module, ...]

    @property
    def weight(self) -> Tensor:
        """The weight as torchao's tensor, if it is in one; else its values [outputs, inputs], decoded anew and read only."""
        stored = parameter(self, "weight")
        return decoded(values(self, rounding.DTYPE[self.dtype])) if stored is None else stored

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module.

        Raises:
            StageError: `param` is to be the weight, as where a plan spreads the layer over processes.
        """
        if name == "weight" and param is not None:
            raise StageError(
                "a converted layer has codes and no weight, so that no plan can spread it over processes: parallelize the "
                "prepared model, and convert the whole = qkit.gather(model)"
            )
        super().register_parameter(name, param)

    def parts(self) -> Parts:
        """The plain arrays of the codes."""
        return tuple(getattr(self, name, None) for name in PLAIN)  # type: ignore[return-value]  # there are codes and scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the codes and keeps the scales as they are: a cast changes only the type that values are rounded to."""
        _apply_to_packed(self, fn, recurse)
        return self


class PackedLinear(_Packed, nn.Linear):  # type: ignore[override]  # `weight` is read only
    """A linear layer of codes. `execution` says how they are multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        y = self.execution.multiply(self, x) if self.execution.multiply and x.numel() else self._decoded(x)
        return slot(self, y, "output", self.rule.output)

    def _decoded(self, x: Tensor) -> Tensor:
        weight = self.weight if self.execution.takes_floats else values(self, rounding.DTYPE[self.dtype])
        return F.linear(slot(self, x, "input", self.rule.activation), weight, self.bias)


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[override]  # as above
    """An embedding of codes. It decodes the rows of the tokens that it sees, not the table."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        return scaled(self, rounding.dequantize(_rows(self, tokens)))


def pack(
    module: nn.Module, q: QTensor[Any], rule: Rule, *, static: Mapping[str, Tensor], owner: nn.Module | None
) -> Any:
    """The deployed form of a Linear or Embedding, float or prepared, with the codes of `q`; see `Modules.pack`."""
    execution = choose_execution(rule, device=q.codes.device, dtype=q.dtype, shape=q.shape)
    laid = _held(owner, execution) if owner else None
    return build(module, laid or lay(q, execution.layout), rule, execution, static=static, owner=owner)


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
    layer = become(module, PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear)
    forget_preparation(layer)
    remove_parameters(layer, "weight")
    layer.rule, layer.grid_name, layer.owner = rule, str(rule.weight), () if owner is None else (owner,)
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
            built[number] = build(module, laid, rule, execution, static=static)
    wrong = {number for flags in broken.values() for number, flag in enumerate(flags.tolist()) if flag}
    return [None if number in wrong else one for number, one in enumerate(built)]


def unpack(module: Any) -> QTensor[Tensor]:
    """The codes and scales of a converted layer."""
    grid = module.rule.weight
    stored = parameter(module, "weight")
    if stored is not None:
        return containers.container_of(stored).read(stored, grid, module.dtype)
    return unlay(_laid(module))


def values(module: Any, dtype: torch.dtype) -> Tensor:
    """The values of a converted layer [outputs, inputs], rounded once to `dtype`."""
    if module.execution.layout == "words" and choose.packs(module.rule.weight, module.codes.device):
        return decode_packed(module.parts(), module.grid_name, _shape(module)[1], dtype)
    return rounding.dequantize(replace(unpack(module), dtype=str(dtype).rpartition(".")[2]))  # type: ignore[arg-type]


def spread_values(module: Any) -> Tensor:
    """The values of a converted layer [outputs, inputs], float32, spread within the cells of their codes."""
    if module.execution.layout == "words":
        return spread_packed(module.parts(), module.grid_name, _shape(module)[1])
    return dithered(replace(unpack(module), dtype="float32"))


def _laid(module: Any) -> Laid:
    codes, scales, zeros, tensor_scale, biases = (getattr(module, name, None) for name in PLAIN)
    assert codes is not None
    assert scales is not None
    return Laid(codes, scales, zeros, tensor_scale, module.rule.weight, module.dtype, _shape(module), biases)


def _held(module: Any, execution: Execution) -> Laid | None:
    """The arrays of `module`, if they lie as `execution` has them."""
    plain = module.execution.container is None and execution.container is None
    return _laid(module) if plain and module.execution.layout == execution.layout else None


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _put_in(layer: Any, laid: Laid, execution: Execution) -> None:
    """Puts codes into a layer that has none yet."""
    layer.execution, layer.dtype = execution, laid.dtype
    if execution.container:
        set_parameter(layer, "weight", nn.Parameter(execution.container.store(laid), requires_grad=False))
        return
    for name in PLAIN:
        if (array := getattr(laid, name)) is not None:
            layer.register_buffer(name, array)


def _apply_to_packed(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    here = _device(module)
    probe = fn(torch.zeros((), dtype=rounding.DTYPE[module.dtype], device=here))
    dtype, rule = dtype_of(probe), module.rule
    execution = choose_execution(rule, device=probe.device, dtype=dtype, shape=_shape(module))
    moved_owners = (owner for owner in module.owner if _device(owner) == probe.device)
    source = next(moved_owners, module)  # the arrays of the owner, once it has moved
    laid = _held(source, execution) or lay(_moved(unpack(source), probe.device), execution.layout)
    arrays = {name: array.to(probe.device) for name in PLAIN if (array := getattr(laid, name)) is not None}
    remove_buffers(module, *PLAIN)
    remove_parameters(module, "weight")
    apply_but_keep(module, fn, recurse, list(static_contents(rule)))
    _put_in(module, replace(laid, dtype=dtype, **arrays), execution)


def _moved(q: QTensor[Tensor], device: torch.device) -> QTensor[Tensor]:
    return q.map(lambda array: array.to(device))


def _device(module: Any) -> torch.device:
    stored = parameter(module, "weight")
    device: torch.device = module.codes.device if stored is None else stored.device
    return device


def _rows(module: Any, tokens: Tensor) -> QTensor[Tensor]:
    """The rows that `tokens` [...] name."""
    laid = _laid(module)
    one = (1,) * (tokens.dim() + 1)
    arrays = {}
    for name in PLAIN:
        array = getattr(laid, name)
        if array is not None and array.dim():
            array = array[tokens] if len(array) == laid.shape[0] else array.reshape(one)
        arrays[name] = array
    return unlay(replace(laid, **arrays, shape=(*tokens.shape, laid.shape[1])))
