"""Every private name of torch that this engine uses, as of torch 2.13. No other module has one; torchao's are in `containers`."""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

GRAPH_TREES = "torch._inductor.cudagraph_trees"  #: the module that replays compiled code as CUDA graphs
MANAGED = "_is_fsdp_managed_module"  #: FSDP marks modules with it
FSDP_ATTRIBUTES = (MANAGED, "_fsdp_use_orig_params")  #: all that FSDP puts on modules

version: Callable[[Tensor], int] = attrgetter("_version")  #: the count of in-place changes, which views share
is_any_autocast_enabled = torch._C._is_any_autocast_enabled  #: asks once for all devices
unsafe_view = torch.ops.aten._unsafe_view.default  #: as `view`, but the result counts as no view of its source
int_product = torch._int_mm  #: int8 [rows, n] times int8 [n, columns] -> int32, exact; on CUDA with more than 16 rows
without_subclasses = torch._C.DisableTorchFunctionSubclass  #: a context in which subclasses of Tensor count as Tensor


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is at work: it needs Functions that it can look into."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def mark_static_address(x: Tensor) -> None:
    """Tells compiled code that `x` stays at its address, so that CUDA graphs do not copy it."""
    torch._dynamo.mark_static_address(x, guard=False)


def float8_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, *, fast: bool) -> Tensor:
    """bfloat16 product of e4m3 `x` [rows, n] and `w` [n, columns]; scales [rows, 1] and [1, columns].

    Args:
        fast: whether sums may have fewer bits.
    """
    return torch._scaled_mm(x, w, x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name` of `module`; None where another tensor or nothing has this name. Faster than `getattr`."""
    return module._parameters.get(name)


def set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Registers the parameter `name` of a module whose class has a property of that name."""
    module._parameters[name] = value


def remove_parameters(module: nn.Module, *names: str) -> None:
    """Removes the parameters `names` that `module` has."""
    for name in names:
        module._parameters.pop(name, None)


def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """`Module._apply` as torch has it, whatever the class of `module` makes of it."""
    nn.Module._apply(module, fn, recurse)


def set_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Puts `buffer` in the place of the buffer `name`."""
    module._buffers[name] = buffer


def remove_buffers(module: nn.Module, *names: str) -> None:
    """Removes the buffers `names` that `module` has."""
    for name in names:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of the children of `module`, which may be written."""
    return module._modules


def fsdp_parameters() -> Iterator[Any]:
    """FSDP2's records of all parameters that it shards in this process."""
    from torch.distributed._composable_state import _get_module_state, _module_state_mapping

    for owner in list(_module_state_mapping):
        state: Any = _get_module_state(owner)
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from () if group is None else group.fsdp_params


def gathered_tensor(record: Any) -> Any:
    """The gathered weight of one of `fsdp_parameters`; None where it is sharded."""
    return getattr(record, "_unsharded_param", None)
