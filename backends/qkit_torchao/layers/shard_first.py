"""Shards are quantized where they lie: each process quantizes its part of a weight once a step, and FSDP2 gathers the values.

The values are those of the master weights, in the type that FSDP's policy names. Learned scales, adapters, and a weight that
layers on different grids share are gathered as they are, and every process quantizes them; see `sharded`.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from qkit.engines.kept import Store
from qkit.errors import StageError
from qkit.fused import shares
from qkit_torchao.cache import identity, values
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.cache.shard import Decodes, Shard, become_shard
from qkit_torchao.layers import shard_codes, spread
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.shard_group import Member, refresh_others
from qkit_torchao.layers.straight_through import masked
from qkit_torchao.torch_private import (
    forget_gathered,
    fsdp_parameters,
    gathered_tensor,
    local_part,
    parameter,
    take_hooks,
    users,
    version,
)


class LayerSource:
    """The layers of one weight, as the `Source` of its shard.

    Attributes:
        layers: weak references to them.
        outer: a weak reference to the sharded parameter.
        agreed: the rule of the layer that all processes have.
        found: the class of the first layer when `alike` was computed, and the result; None where a layer has changed since.
        others: weak references to the sharded weights that share the tensor scale; None before they are looked for.
        memory: by type, the padded tensor to gather, and a view of it for the values of the shard.
        latest: the type, rule and mode of the last values that depend on the shard alone, their gate, and their `memory`.
        member: its place among the weights that FSDP gathers together; None where FSDP does not know the weight.
        packs: whether FSDP gathers packed codes, see `shard_codes`, unless the layer is off; and `packed`, whether it did last.
    """

    packs: bool = False
    packed: bool = False

    def __init__(self, layers: list[Any], outer: Any, record: Any = None) -> None:
        self.member: Member | None = None if record is None else Member(record)
        self.layers, self.outer = [ref(layer) for layer in layers], ref(outer)
        self.found: tuple[type, bool] | None = None
        self.agreed: Any = None
        self.others: list[ref[Any]] | None = None
        self.memory: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self.latest: tuple[Any, ...] = (None, None, None, None, None, None)

    def gathers(self) -> bool:
        """See `Source.gathers`. After a forward FSDP may have parts of the gathered values, and gathers them as they are."""
        first, outer = self.layers[0](), self.outer()
        if outer is None or not self.alike():
            return False
        registered: Any = None if first is None else parameter(first, "weight")
        return registered is outer or getattr(registered, "device_mesh", outer.device_mesh) == outer.device_mesh

    def alike(self) -> bool:
        """Whether all layers of the weight compute with the same values, which depend on the weight alone."""
        first = self.layers[0]()
        if self.found is None or self.found[0] is not type(first):
            layers = [layer() for layer in self.layers]
            self.found = type(first), _alike(layers)
            for layer in layers:
                if layer is not None and hasattr(layer, "gathers_values"):
                    layer.gathers_values = self.found[1]
        return self.found[1]

    def version(self) -> int:
        """See `Source.version`."""
        outer = self.outer()
        return 0 if outer is None else version(outer)

    def parts(self, shard: Shard, rows: int, policy: Any) -> tuple[tuple[Tensor, ...], Decodes | None]:
        """See `Source.parts`: the values of `shard`, or its packed codes."""
        if self.member is not None:
            refresh_others(self, policy)
        layer, outer = self.layers[0](), self.outer()
        packed = self.packs and layer is not None and outer is not None and layer.mode != "off"
        if packed != self.packed:
            self.packed, record = packed, None if self.member is None else self.member.record()
            if record is not None:
                forget_gathered(record)
        if not packed:
            return (self.local(shard, rows, policy),), None
        self._want_one_rule(layer, outer)
        return shard_codes.encoded(shard, layer)

    def local(self, shard: Shard, rows: int, policy: Any) -> Tensor:
        """The values of `shard`, padded to `rows`.

        FSDP gathers every weight twice a step on the thread that feeds the device, so that `latest` saves all but one check.
        """
        layer, dtype = self.layers[0](), policy.param_dtype or shard.dtype
        known, rule, mode, on, target, padded = self.latest
        same = known is dtype and layer is not None and rule is layer.rule and mode == layer.mode and layer.training
        if same and values.current(shard, rule.weight, on, target) is not None:
            return padded  # type: ignore[no-any-return]
        return self.values(shard, rows, dtype)[1]

    def values(self, shard: Shard, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The values of `shard` in `dtype`, and the memory of `rows` rows that they begin.

        They are cached until the weight changes; in evaluation they are computed anew.
        """
        layer, outer = self.layers[0](), self.outer()
        assert layer is not None
        assert outer is not None
        self._want_one_rule(layer, outer)
        padded, target = self._memory(shard, rows, dtype)
        partners = self._partners(layer)
        if spread.depends_on_others(outer, layer.weight_grid):
            stamp = (dtype, layer.weight_grid, layer.mode, *(identity.state(part) for part in (shard, *dict(partners))))
            kept = _kept.of(shard) or KeptOfTensor(shard, _kept)
            if not layer.training or kept.current(stamp) is not target:
                part, off = shard.detach(), layer.mode == "off"
                target.copy_(part if off else spread.values(part, outer, layer.weight_grid, partners=partners))
                kept.put(target, stamp)
        elif shard.numel():
            if not layer.training:
                values.drop(shard)
            on = gate(shard.device, on=layer.mode != "off")
            if values.current(shard, layer.weight_grid, on, target) is None:
                values.of(shard, layer.weight_grid, on, dtype, into=target)
            self.latest = dtype, layer.rule, layer.mode, on, target, padded
        return target, padded

    def _want_one_rule(self, layer: Any, outer: Any) -> None:
        """Refuses processes whose layers have different rules; asks them once for each rule.

        Raises:
            StageError: the message has the rule of this process.
        """
        rule = layer.rule
        if rule is self.agreed:
            return
        text, mesh = spread.rule_text(rule), outer.device_mesh
        if not spread.agree(text, outer.device, [mesh.get_group(place) for place in range(mesh.ndim)]):
            raise StageError(
                f"processes disagree on the rule of a weight {list(outer.shape)}, which is {text} in this one: "
                "prepare the model by the same recipe in every process"
            )
        self.agreed = rule

    def unclipped(self, outer: Any) -> Tensor | None:
        """Where the part of `outer` is not clipped, if the layers pass no gradient elsewhere; else None."""
        layer = self.layers[0]()
        if layer is None or layer.rule.ste != "masked" or layer.mode == "off" or not self.gathers():
            return None
        part = local_part(outer).detach()
        return spread.unclipped(part, outer, layer.weight_grid, partners=self._partners(layer))

    def mask(self, outer: Any) -> None:
        """Sets the gradient of clipped weights to zero, where the layers ask for that."""
        inside = None if outer.grad is None else self.unclipped(outer)
        if inside is not None:
            gradient = local_part(outer.grad)
            gradient.copy_(masked(gradient, inside))

    def _partners(self, layer: Any) -> list[tuple[Tensor, Any]]:
        """Parts and wholes of the other weights that share the tensor scale of `layer`."""
        if not (layer.fused and shares(layer.rule.weight)):
            return []
        found = [one() for one in self.others or [ref(self)]]
        if any(one is None or one is self for one in found):
            known = {id(user): record.sharded_param for _, record in fsdp_parameters() for user in users(record)}
            found = [known.get(id(other), other.weight) for other in layer.fused if shares(other.rule.weight)]
            self.others = [ref(one) for one in found]
        return [(local_part(one), one) for one in found]

    def _memory(self, shard: Shard, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same memory at each step; but new memory for a copy of a shard that is offloaded, which FSDP drops."""
        outer = self.outer()
        if outer is not None and local_part(outer) is shard and dtype in self.memory:
            padded, target = self.memory[dtype]
            if target.shape == shard.shape and padded.device == shard.device:
                return padded, target
        padded = torch.zeros((max(rows, len(shard)), *shard.shape[1:]), dtype=dtype, device=shard.device)
        if outer is not None and local_part(outer) is shard:
            self.memory[dtype] = padded, padded[: len(shard)]
        return padded, padded[: len(shard)]


def install(layer: Any) -> None:
    """Has FSDP2 gather the values of the weight of `layer`, which it has sharded, where it can."""
    layer.values_buffer = None  # it is of the size of the whole weight
    weight: Any = layer.weight  # while a state is loaded, not yet the one that FSDP knows
    for _, record in fsdp_parameters():
        if layer in users(record) and record.sharded_param.dim() > 1:
            _install(record, weight if hasattr(weight, "device_mesh") else record.sharded_param, users(record))


def holds_values(record: Any) -> bool:
    """Whether the weight that FSDP gathered, of one of `fsdp_parameters`, holds values, and not master weights."""
    part: Any = local_part(record.sharded_param)
    if not isinstance(part, Shard):
        return False
    source: Any = part.source
    return source.alike() and (source.member is None or source.member.holds_values(part))


def drop(weight: Tensor) -> None:
    """Drops the cached values of a weight, and of its part in this process; the next use computes them again."""
    values.drop(weight)
    if hasattr(weight, "device_mesh"):
        part = local_part(weight)
        values.drop(part)
        if kept := _kept.of(part):
            kept.drop()


def groups_of(layer: Any) -> list[Any]:
    """The groups of processes over which FSDP2 shards or copies the weight of `layer`."""
    for _, record in fsdp_parameters():
        if layer in users(record):
            mesh = record.sharded_param.device_mesh
            return [mesh.get_group(number) for number in range(mesh.ndim)]
    return []


def release(layer: Any) -> None:
    """Frees the weight of `layer` that FSDP has gathered, since the layer will compute with other values of it."""
    for owner, record in fsdp_parameters():
        if layer in users(record):
            part: Any = local_part(record.sharded_param)
            if isinstance(part, Shard):
                source: Any = part.source
                become_shard(part, source)
                source.found = None
                if source.member is not None:
                    source.member.release()
            if gathered_tensor(record) is layer.weight:
                owner.reshard()  # type: ignore[operator]


_kept: Store[KeptOfTensor[Tensor]] = Store()


def _install(record: Any, outer: Any, layers: list[Any]) -> None:
    part = local_part(outer)
    if isinstance(part, Shard) and part.source.outer() is outer:  # type: ignore[attr-defined]
        return
    if not _alike(layers) or spread.splits_groups(part, outer, layers[0].weight_grid):
        return
    source = LayerSource(layers, outer, record)
    become_shard(part, source)
    take_hooks(record)
    if outer.requires_grad:
        outer.register_post_accumulate_grad_hook(source.mask)


def _alike(layers: list[Any]) -> bool:
    """Whether all layers of one weight compute with the same values, which depend on the weight alone."""
    if any(layer is None or not getattr(layer, "caches", False) or layer.multiplies_codes for layer in layers):
        return False
    return len({(layer.weight_grid, layer.mode == "off", layer.rule.ste) for layer in layers}) == 1
