"""Every private name of torch that this engine uses, as of torch 2.13. No other module has one; torchao's are in `containers`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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


def keeping_version(x: Tensor) -> AbstractContextManager[None]:
    """A context in which `x` is filled without a trace in its version."""
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    return _unsafe_preserve_version_counter(x)


def is_read_by(*modules: str) -> bool:
    """Whether the property that asks is read by code of one of these Python modules. Nothing else tells readers apart."""
    return sys._getframe(2).f_globals.get("__name__") in modules


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


def fsdp_groups() -> Iterator[tuple[nn.Module, list[Any]]]:
    """FSDP2's records of the parameters that it gathers together, each list with the module that was given to FSDP."""
    from torch.distributed._composable_state import _get_module_state, _module_state_mapping

    for owner in list(_module_state_mapping):
        state: Any = _get_module_state(owner)
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        yield from ((owner, group.fsdp_params) for group in groups if group is not None)


def fsdp_parameters() -> Iterator[tuple[nn.Module, Any]]:
    """FSDP2's records of all parameters that it shards in this process, each with the module that was given to FSDP."""
    for owner, group in fsdp_groups():
        yield from ((owner, record) for record in group)


def copied(record: Any) -> Any:
    """The tensor that FSDP copies for one of `fsdp_parameters` when it gathers and no hook tells it what."""
    return record._sharded_param_data


def set_copied(record: Any, tensor: Tensor) -> None:
    """Has FSDP copy `tensor`, see `copied`."""
    record._sharded_param_data = tensor


def forget_gathered(record: Any) -> None:
    """Has FSDP allocate new tensors to gather one of `fsdp_parameters` into: its hook will give others than before."""
    record.all_gather_outputs = []


def gathered_tensor(record: Any) -> Any:
    """The gathered weight of one of `fsdp_parameters`; None where it is sharded."""
    return getattr(record, "_unsharded_param", None)


def local_part(outer: Any) -> Tensor:
    """The tensor in this process of a DTensor: the very object, of which `DTensor.to_local` may give a view."""
    part: Tensor = outer._local_tensor
    return part


def is_going_back() -> bool:
    """Whether autograd is at work in this thread, as where a checkpoint computes a forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def active_ddp() -> Any:
    """The `DistributedDataParallel` whose forward runs; None where there is none."""
    if not torch.distributed.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()


def place_of(outer: Any) -> tuple[slice, ...]:
    """Where the tensor in this process of a DTensor lies in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, begin = compute_local_shape_and_global_offset(outer.shape, outer.device_mesh, outer.placements)
    return tuple(slice(a, a + n) for a, n in zip(begin, shape, strict=True))


def take_hooks(record: Any) -> None:
    """Has one of `fsdp_parameters` look for hooks of its part, as FSDP does when it begins."""
    if not hasattr(record, "_extensions_data"):
        record._init_extensions()


def users(record: Any) -> list[nn.Module]:
    """The modules that have the parameter of one of `fsdp_parameters`."""
    about = record._module_info
    return [about.module, *about.shared_modules]


class Managed:
    """The mark that FSDP puts on modules, as an attribute of a class: it calls `see(module)` when FSDP sets the mark."""

    def __init__(self, see: Callable[[Any], None]) -> None:
        self.see = see

    def __get__(self, module: Any, cls: Any = None) -> Any:
        """The mark of `module`."""
        if module is None or MANAGED not in module.__dict__:
            raise AttributeError(MANAGED)
        return module.__dict__[MANAGED]

    def __set__(self, module: Any, value: Any) -> None:
        """Sets the mark of `module`."""
        module.__dict__[MANAGED] = value
        self.see(module)
