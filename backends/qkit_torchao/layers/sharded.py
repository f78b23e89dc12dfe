"""Models that FSDP2 has sharded over processes: the weights that are shards, and the values that are gathered of them."""

import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qkit.errors import StageError
from qkit_torchao.layers import shard_first
from qkit_torchao.layers.become import is_wrapped
from qkit_torchao.layers.straight_through import PLAIN
from qkit_torchao.torch_private import (
    MANAGED,
    active_ddp,
    fsdp_parameters,
    gathered_tensor,
    is_any_autocast_enabled,
    parameter,
    users,
)


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP gathers the module's weights before it runs, and frees them after."""
    return MANAGED in module.__dict__  # getattr would look for a parameter of that name


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before FSDP put its own in front."""
    cls: Any = type(module)
    return cls.__bases__[1] if is_wrapped(cls) else cls  # type: ignore[no-any-return]


def is_shard(tensor: Tensor | None) -> bool:
    """Whether `tensor` is spread over processes."""
    return type(tensor) not in PLAIN and hasattr(tensor, "full_tensor")


def is_sharded(module: Any) -> bool:
    """Whether the weight of `module` is spread over processes, or gathered for as long as it computes."""
    return is_managed(module) or is_shard(module.weight)


def install(layer: Any) -> None:
    """See `shard_first.install`, where FSDP manages the layer."""
    if is_managed(layer):
        shard_first.install(layer)


def release(layer: Any) -> None:
    """See `shard_first.release`, where FSDP manages the layer."""
    if is_managed(layer):
        shard_first.release(layer)


def groups_of_data(layer: nn.Module) -> list[Any]:
    """The groups of processes that compute with `layer` on other parts of a batch: under FSDP2 and DDP."""
    if is_managed(layer):
        return shard_first.groups_of(layer)
    active = None if torch.compiler.is_compiling() else active_ddp()
    return [] if active is None else [active.process_group]


def want_partitioned_by_none(weight: Any) -> None:
    """Refuses a weight that DeepSpeed's ZeRO-3 has partitioned.

    Raises:
        StageError: the message names the way out.
    """
    seen = torch.compiler.is_compiling() and weight.numel()  # a compiled step would ask for the attribute at each call
    if not seen and hasattr(weight, "ds_id"):
        raise StageError(
            f"DeepSpeed ZeRO-3 has partitioned a weight {list(getattr(weight, 'ds_shape', weight.shape))}, so that no layer sees "
            "its master weight: train with ZeRO-1, ZeRO-2, or torch.distributed.fsdp.fully_shard"
        )


def want_known(module: Any) -> None:
    """Refuses a layer whose weight is spread over processes by something other than FSDP2 and tensor parallelism.

    Raises:
        StageError: the message names it.
    """
    weight = parameter(module, "weight")
    want_partitioned_by_none(weight)
    if is_managed(module) and not any(module in users(record) for _, record in fsdp_parameters()):
        raise StageError(_other_than_fsdp2(weight))


def want_own_types(module: nn.Module, *names: str) -> None:
    """Refuses parameters that FSDP has gathered in another type than they have.

    Raises:
        StageError: the message names one of them.
    """
    if not is_managed(module):
        return
    for name in names:
        one = parameter(module, name)
        record = next((record for _, record in fsdp_parameters() if gathered_tensor(record) is one), None)
        if one is not None and record is not None and record.sharded_param.dtype != one.dtype:
            raise StageError(
                f"FSDP rounds {name} from {_name(record.sharded_param.dtype)} to {_name(one.dtype)}, so that training would "
                "see another merged weight than deployment: leave param_dtype out, and run under "
                f'torch.autocast("{one.device.type}", {one.dtype})'
            )


def _other_than_fsdp2(weight: Tensor | None) -> str:
    shape = None if weight is None else list(weight.shape)
    return (
        f"a weight {shape} was gathered by something other than FSDP2, as FSDP1 does, whose master weights qkit cannot see: "
        "shard the prepared model with torch.distributed.fsdp.fully_shard"
    )


Gathered = Literal["", "values", "masters"]


def gathered(module: nn.Module) -> Gathered:
    """What FSDP gathered as the weight of `module` for the forward that begins, and will free afterwards; empty if nothing.

    Raises:
        StageError: it is neither the values nor the master weight, so that training would see other codes than deployment: FSDP
            has rounded the master weights, or does not show them.
    """
    if not is_managed(module):
        return ""
    if torch.compiler.is_compiling() and getattr(module, "gathers_values", False):  # torch 2.11 cannot ask here
        return "values"
    weight: Any = module.weight
    found = _found(module)
    if found is None:
        raise StageError(_other_than_fsdp2(weight))
    how: Gathered
    how, master = found
    if how == "masters" and master != weight.dtype:
        raise StageError(
            f"FSDP rounds master weights from {_name(master)} to {_name(weight.dtype)} before they are quantized, so that "
            f"training would see other codes than deployment, and {_why(module)}: leave param_dtype out of its "
            f'MixedPrecisionPolicy, and run under torch.autocast("{weight.device.type}", {weight.dtype}), which rounds the '
            "quantized values instead"
        )
    return how


def has_values(module: Any, x: Tensor) -> bool:
    """Whether FSDP gathered values of `module`, in the type of its input `x`, and nothing else changes them: quickly told."""
    if torch.compiler.is_compiling() or is_any_autocast_enabled():
        return False
    weight, known = parameter(module, "weight"), _sources.get(module)
    source: Any = known() if known else None
    if source is None or weight is None or gathered_tensor(source) is not weight or weight.dtype != x.dtype:
        return False
    return shard_first.holds_values(source)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _found(module: nn.Module) -> tuple[Gathered, torch.dtype] | None:
    """What FSDP2 gathered, and the type of the master weights; None if FSDP2 has not gathered the weight of `module`."""
    known = _sources.get(module)
    source: Any = known() if known else None
    if source is None or gathered_tensor(source) is not module.weight:
        source = next((one for _, one in fsdp_parameters() if gathered_tensor(one) is module.weight), None)
        if source is None:
            return None
        _sources[module] = weakref.ref(source)
    dtype: torch.dtype = source.sharded_param.dtype
    return "values" if shard_first.holds_values(source) else "masters", dtype


def _why(module: Any) -> str:
    """Why a layer's values cannot be gathered in the place of its master weights."""
    if not getattr(module, "caches", False):
        return "values that depend on more than the weight cannot be gathered instead"
    if module.multiplies_codes:
        return "codes that a kernel multiplies cannot be gathered instead"
    return "its shards have lost what has FSDP gather values instead, or split a group, or another layer shares them"


_sources: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
