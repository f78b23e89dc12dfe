"""Weights that FSDP2 gathers together: it asks the first one, and the others are copied as master weights are.

FSDP copies what its record of a weight refers to, all weights of a group in one launch, unless a weight has hooks. A hook for
each weight costs the host more than the copy. So the first weight alone has hooks. When it is asked, before anything is copied,
it brings the values of the others up to date, and has their records refer to those.
"""

from typing import Any, Protocol
from weakref import ref

from torch import Tensor

from qkit_torchao.cache.shard import AskedShard, Shard, become_shard
from qkit_torchao.layers import spread
from qkit_torchao.torch_private import copied, fsdp_groups, is_going_back, local_part, set_copied


class Gathered(Protocol):
    """The source of a shard, see `shard_first.LayerSource`."""

    member: "Member | None"
    layers: list[Any]
    packs: bool

    def gathers(self) -> bool:
        """See `Source.gathers`."""

    def local(self, shard: Shard, rows: int, policy: Any) -> Tensor:
        """The values of `shard`, padded to `rows`."""


class Member:
    """The place of one weight among those that FSDP gathers together.

    Attributes:
        record: a weak reference to FSDP's record of the weight.
        first: the source that FSDP is asked for this weight, too; None where the weight has hooks of its own.
        flat: the values that the record refers to, and the padded tensor whose view they are.
        masters: the tensor that the record referred to before.
        after: weak references to the records that FSDP gathers after this one; None before they are looked for.
    """

    def __init__(self, record: Any) -> None:
        self.record = ref(record)
        self.first: ref[Gathered] | None = None
        self.flat: tuple[Tensor | None, Tensor | None] = (None, None)
        self.masters: Tensor | None = None
        self.after: list[ref[Any]] | None = None

    def release(self) -> None:
        """Has FSDP copy master weights again, until the next `refresh_others`."""
        record = self.record()
        if record is not None and self.masters is not None and copied(record) is self.flat[0]:
            set_copied(record, self.masters)
        self.first = None

    def holds_values(self, part: Shard) -> bool:
        """Whether FSDP gathers values of `part`: it asks for them, or asks the first weight, which still knows this one."""
        if type(part) is AskedShard:
            return True
        first, record = None if self.first is None else self.first(), self.record()
        if first is None or record is None or copied(record) is not self.flat[0]:
            return False
        asked: Any = None if first.member is None else first.member.record()
        shard: Any = None if asked is None else local_part(asked.sharded_param)
        source: Any = shard.source if type(shard) is AskedShard else None
        return source is first


def refresh_others(first: Gathered, policy: Any) -> None:
    """Has FSDP copy current values of the weights that it gathers after that of `first`, which it has asked.

    The backward pass gathers the values of the forward pass.
    """
    if first.member is None or is_going_back():
        return
    for other in _after(first.member):
        part: Any = local_part(other.sharded_param)
        if isinstance(part, Shard):
            _refresh(other, part, first, policy)


def _refresh(record: Any, part: Shard, first: Gathered, policy: Any) -> None:
    source: Any = part.source
    member: Member | None = source.member
    if member is None:
        return
    follows = type(part) is Shard or _may_follow(record, source)  # a change of the grid makes it an `AskedShard`
    if not (source.gathers() and follows):
        if member.first is not None:
            member.release()
            become_shard(part, source)
        return
    padded = source.local(part, record.padded_sharded_param_size[0], policy)
    flat = member.flat[0]
    if flat is None or member.flat[1] is not padded:
        flat = padded.view(-1)
        member.flat = flat, padded
    if copied(record) is not flat:
        member.masters = copied(record)
        set_copied(record, flat)
    if type(part) is not Shard:
        become_shard(part, source, asked=False)
    if member.first is None or member.first() is not first:
        member.first = ref(first)


def _may_follow(record: Any, source: Any) -> bool:
    """Whether FSDP copies the part as it is: one of rows, on the device, whose values no other process has to know."""
    layer = source.layers[0]()
    return (
        layer is not None
        and not source.packs
        and not record.offload_to_cpu
        and record.param_dtype is not None
        and record.fsdp_placement.dim == 0
        and getattr(record, "_unsharded_dtensor_spec", None) is None
        and not spread.depends_on_others(record.sharded_param, layer.weight_grid)
    )


def _after(member: Member) -> list[Any]:
    """The records that FSDP gathers after that of `member`, in its order. They are looked for once: FSDP's groups stay."""
    if member.after is None:
        mine = member.record()
        group = next((group for _, group in fsdp_groups() if any(one is mine for one in group)), [])
        place = next((place for place, one in enumerate(group) if one is mine), len(group))
        member.after = [ref(one) for one in group[place + 1 :]]
    return [record for one in member.after if (record := one()) is not None]
