"""The whole model again, after FSDP2 has sharded it over processes."""

from typing import Any

import torch
from torch import Tensor, nn

from qkit_torchao.layers.sharded import class_of, is_shard
from qkit_torchao.torch_private import FSDP_ATTRIBUTES

HERE = "torch.distributed"
CHECKPOINTS, WRAPPED = "CheckpointWrapper", "_checkpoint_wrapped_module"  #: torch's module that recomputes another one


def gather(model: nn.Module) -> nn.Module | None:
    """See `Modules.gather`. The whole model is on the CPU and has the class, the attributes and the hooks that it had before.

    Wrappers that recompute a module going back are left out.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):  # a forward may have left weights whole, perhaps rounded
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
    """All of `shard`, on the CPU; every process has to call this."""
    there = shard.detach().to(shard.device_mesh.device_type)  # where it was offloaded from
    full: Tensor = there.full_tensor().cpu()
    return full


def _copied(module: nn.Module, whole: dict[int, Tensor], copies: dict[int, nn.Module]) -> nn.Module:
    """`module` as it was before FSDP, with the tensors of `whole`, by the ids of their shards."""
    if id(module) in copies:
        return copies[id(module)]
    cls = class_of(module)
    if cls.__name__ == CHECKPOINTS and hasattr(module, WRAPPED):  # names of files must not have its part
        return _copied(getattr(module, WRAPPED), whole, copies)
    copy: nn.Module = cls.__new__(cls)
    copies[id(module)] = copy
    for key, value in module.__dict__.items():
        if key.endswith("_hooks"):
            value = type(value)((one, hook) for one, hook in value.items() if not _is_of_fsdp(hook))
        elif key in ("_parameters", "_buffers"):
            value = {name: None if one is None else _here(one, whole) for name, one in value.items()}
        elif key == "_modules":
            value = {name: None if child is None else _copied(child, whole, copies) for name, child in value.items()}
        elif key in ("forward", *FSDP_ATTRIBUTES):
            continue  # accelerate's forward is bound to the sharded model
        copy.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    return copy


def _here(tensor: Tensor, whole: dict[int, Tensor]) -> Tensor:
    """The copy of `tensor`, the same for all modules that share it."""
    if id(tensor) not in whole:
        copy = tensor.detach().cpu().clone()
        whole[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return whole[id(tensor)]


def _is_of_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(HERE)
