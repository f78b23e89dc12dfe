"""`gather_codes`: has FSDP2 gather packed codes of weights in the place of their values, see `layers.shard_codes`."""

from typing import Any

from torch import nn

from qkit.errors import StageError
from qkit_torchao.cache.shard import Shard
from qkit_torchao.kernels import choose
from qkit_torchao.layers import shard_first, spread
from qkit_torchao.torch_private import fsdp_parameters, local_part, users


def gather_codes(model: nn.Module) -> nn.Module:
    """Has FSDP2 gather packed codes in the place of values, for every weight of the sharded `model` where it can. Returns it.

    Call it in every process, after `fully_shard` and before the first step. The values that layers compute with do not change.
    Weights whose rows the processes do not share evenly are still gathered as values, and so are those whose scales depend on
    several processes, and layers that are switched off.

    Raises:
        StageError: there is no such weight; the message says why the first one is none.
    """
    reasons, found = [], False
    mine = {id(module) for module in model.modules()}
    for _, record in fsdp_parameters():
        part: Any = local_part(record.sharded_param)
        if not (isinstance(part, Shard) and any(id(user) in mine for user in users(record))):
            continue
        layer = users(record)[0]
        reason = _obstacle(record, layer)
        if reason:
            reasons.append(f"a weight {list(record.sharded_param.shape)} {reason}")
            continue
        shard_first.release(layer)
        part.source.packs = found = True  # type: ignore[attr-defined]
    if not found:
        why = reasons[0] if reasons else "no prepared weight is sharded by FSDP2: call prepare and fully_shard first"
        raise StageError(f"cannot gather codes: {why}")
    return model


def _obstacle(record: Any, layer: Any) -> str:
    """Why the codes of the weight of `record` cannot be gathered; empty if they can."""
    outer, grid = record.sharded_param, layer.weight_grid
    processes = record.mesh_info.shard_mesh_size
    if (
        record.fsdp_placement.dim
        or spread.depends_on_others(outer, grid)
        or grid.has_tensor_scale
        or grid.group == "tensor"
    ):
        return f"on {grid} has scales that depend on several processes: gather values, the default"
    if outer.shape[0] % processes:
        return f"has rows that {processes} processes do not share evenly: gather values, the default"
    if not choose.packs(grid, outer.device):
        return f"has no kernel for packed codes: {choose.why_not_packed(outer.device) or f'none is on {grid}'}"
    return ""
