"""Models that FSDP2 has sharded over processes: which weights are shards, and the types of their master weights."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import StageError
from qkit_torchao.torch_private import MANAGED, fsdp_parameters, gathered_tensor


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP gathers the module's weights before it runs, and frees them after."""
    return MANAGED in module.__dict__  # getattr would look for a parameter of that name


def is_shard(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: Any) -> bool:
    """Whether the weight of `module` is spread over processes, or gathered for as long as it computes."""
    return is_managed(module) or is_shard(module.weight)


def is_gathered(module: nn.Module) -> bool:
    """Whether FSDP gathered the weight of `module` for the forward that begins, and will free it afterwards.

    Raises:
        StageError: it is not the master weight, so that training would see other codes than deployment: FSDP has rounded the
            master weights, or does not show them. Or it is a shard.
    """
    weight: Any = module.weight
    if is_shard(weight):
        raise StageError(
            f"a weight {list(weight.shape)} is a shard where its layer computes: prepared layers know fully_shard of FSDP2, "
            "and no tensor parallelism"
        )
    if not is_managed(module):
        return False
    master = _master_type(module)
    if master is None:
        raise StageError(
            f"a weight {list(weight.shape)} was gathered by something other than FSDP2, whose master weights qkit cannot see: "
            "shard the prepared model with torch.distributed.fsdp.fully_shard"
        )
    if master != weight.dtype:
        raise StageError(
            f"FSDP rounds master weights from {_name(master)} to {_name(weight.dtype)} before they are quantized, so that "
            "training would see other codes than deployment: leave param_dtype out of its MixedPrecisionPolicy, and run under "
            f'torch.autocast("{weight.device.type}", {weight.dtype}), which rounds the quantized values instead'
        )
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _master_type(module: nn.Module) -> torch.dtype | None:
    """The type of the shards of the gathered weight of `module`; None if FSDP2 has not gathered it."""
    known = _sources.get(module)
    source: Any = known() if known else None
    if source is None or gathered_tensor(source) is not module.weight:
        source = next((one for one in fsdp_parameters() if gathered_tensor(one) is module.weight), None)
        if source is None:
            return None
        _sources[module] = weakref.ref(source)
    dtype: torch.dtype = source.sharded_param.dtype
    return dtype


_sources: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
