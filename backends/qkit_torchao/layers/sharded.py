"""Models that FSDP2 has sharded over processes: whose weights are shards, what their masters are, and the whole model again."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import StageError

HERE = "torch.distributed"


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP gathers the module's weights before it runs, and frees them after."""
    return "_is_fsdp_managed_module" in module.__dict__  # getattr would look for a parameter of that name


def is_shard(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over processes."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: Any) -> bool:
    """Whether the weight of `module` is spread over processes, or gathered for as long as it computes."""
    return is_managed(module) or is_shard(module.weight)


def is_gathered(module: nn.Module) -> bool:
    """Whether the weight of `module`, which is about to compute, was gathered by FSDP, and will be freed after.

    Raises:
        StageError: then it is not its master's, so that other codes would be trained than are deployed: FSDP has rounded the
            masters, or does not show them. Or it is a shard.
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
            f"a weight {list(weight.shape)} was gathered by something other than FSDP2, whose masters qkit cannot see: shard "
            "the prepared model with torch.distributed.fsdp.fully_shard"
        )
    if master != weight.dtype:
        raise StageError(
            f"FSDP rounds masters from {_word(master)} to {_word(weight.dtype)} before they are quantized, so that what is "
            "trained would not be what is deployed: leave param_dtype out of its MixedPrecisionPolicy, and run the model under "
            f'torch.autocast("{weight.device.type}", {weight.dtype}), which rounds the quantized values instead'
        )
    return True


def gather(model: nn.Module) -> nn.Module | None:
    """See `Backend.gather`. The whole model is on the CPU and has the class, the attributes and the hooks that it had before."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):  # what a forward left whole, perhaps rounded
            module.reshard()
    shards = {id(one): one for one in (*model.parameters(), *model.buffers()) if is_shard(one)}
    if not shards:
        return model
    keeps = torch.distributed.get_rank() == 0
    whole: dict[int, Tensor] = {}
    for key, shard in shards.items():
        full = _full(shard)
        if keeps:
            whole[key] = nn.Parameter(full, shard.requires_grad) if isinstance(shard, nn.Parameter) else full
    return _copied(model, whole, {}) if keeps else None


def _full(shard: Any) -> Tensor:
    """All of `shard`, on the CPU; every process has to ask."""
    there = shard.detach().to(shard.device_mesh.device_type)  # where it was offloaded from
    full: Tensor = there.full_tensor().cpu()
    return full


def _copied(module: nn.Module, whole: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    """`module` as it was before FSDP, with the tensors of `whole` by the ids of what stands for them."""
    if id(module) in made:
        return made[id(module)]
    cls: Any = type(module)
    if cls.__module__.startswith(HERE) and len(cls.__bases__) == 2:  # FSDPLinear(FSDPModule, Linear)
        cls = cls.__bases__[1]
    copy: nn.Module = cls.__new__(cls)
    made[id(module)] = copy
    for key, value in module.__dict__.items():
        if key.endswith("_hooks"):
            value = type(value)((one, hook) for one, hook in value.items() if not _is_theirs(hook))
        elif key in ("_parameters", "_buffers"):
            value = {name: None if one is None else _here(one, whole) for name, one in value.items()}
        elif key == "_modules":
            value = {name: None if child is None else _copied(child, whole, made) for name, child in value.items()}
        elif key in ("forward", "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            continue  # accelerate's forward is bound to the sharded model
        copy.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    return copy


def _here(tensor: Tensor, whole: dict[int, Tensor]) -> Tensor:
    """What stands in for `tensor`, the same for whoever shares it."""
    if id(tensor) not in whole:
        copy = tensor.detach().cpu().clone()
        whole[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return whole[id(tensor)]


def _is_theirs(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(HERE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _master_type(module: nn.Module) -> torch.dtype | None:
    """The type of the shards that the weight of `module` is gathered from; None if FSDP2 has not gathered it."""
    known = _sources.get(module)
    source: Any = known() if known else None
    if source is None or source._unsharded_param is not module.weight:
        source = next((one for one in _all_sources() if getattr(one, "_unsharded_param", None) is module.weight), None)
        if source is None:
            return None
        _sources[module] = weakref.ref(source)
    dtype: torch.dtype = source.sharded_param.dtype
    return dtype


_sources: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def _all_sources() -> Iterator[Any]:
    """What FSDP2 knows of every parameter that it shards: torch 2.13 has no public way to ask."""
    from torch.distributed._composable_state import _get_module_state, _module_state_mapping

    for owner in list(_module_state_mapping):
        state: Any = _get_module_state(owner)
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from () if group is None else group.fsdp_params


def _word(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
