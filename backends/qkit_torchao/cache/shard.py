"""The local part of a weight that FSDP2 shards, as a tensor that tells FSDP what to gather in its place. No arithmetic."""

from inspect import Signature, signature
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qkit_torchao.torch_private import keeping_version, local_part, version, without_subclasses

#: torch makes new local parts by these, from old ones: the new one is a `Shard`, too.
CARRIED = frozenset({Tensor.new_zeros, Tensor.narrow, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory})


class Decodes(Protocol):
    """How gathered tensors become values."""

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The values in `dtype` [rows, ...], of all processes."""


class Source(Protocol):
    """The reason why a local part is a `Shard`: it knows the layers of the weight."""

    def gathers(self) -> bool:
        """Whether FSDP shall ask for what to gather: not where it gathers parts of values that were gathered before."""

    def version(self) -> int:
        """The count of in-place changes of the whole, sharded weight: those of its parts do not count all of them."""

    def parts(self, shard: "Shard", rows: int, policy: Any) -> tuple[tuple[Tensor, ...], "Decodes | None"]:
        """The tensors to gather for `shard`, padded to `rows` as FSDP pads it; and how they become values, unless they are."""


class Shard(Tensor):
    """The local part of a sharded weight. FSDP2 gathers the values of its `source` in its place, see `shard_group`.

    Everything but `CARRIED` makes plain tensors of it, so that neither checkpoints nor optimizers meet its class.
    """

    source: Source

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As any tensor; the results of `CARRIED` have the same source."""
        with without_subclasses():
            result = func(*args, **(kwargs or {}))
            if func in CARRIED and isinstance(args[0], Shard):
                become_shard(result, args[0].source)
        return result

    def changes(self) -> int:
        """Grows with every in-place change that torch counts, of this part or of the whole weight."""
        return version(self) + self.source.version()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the plain tensor: a checkpoint must open without qkit."""
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain copy."""
        copy: Tensor = _plain(self).clone()
        memo[id(self)] = copy
        return copy


class AskedShard(Shard):
    """A shard that FSDP2 asks for the tensor to gather, by its two hooks."""

    @property
    def fsdp_pre_all_gather(self) -> Any:
        """FSDP2's first hook: the tensors to gather, and for the second hook how they become values."""
        if not self.source.gathers():
            raise AttributeError("fsdp_pre_all_gather")

        return _Gather(self)

    @property
    def fsdp_post_all_gather(self) -> Any:
        """FSDP2's second hook: the gathered values, or those of the gathered codes, are the weight."""
        if not self.source.gathers():
            raise AttributeError("fsdp_post_all_gather")
        return _gathered


SHARDS = (Shard, AskedShard)


class _Gather:
    """FSDP2's first hook. It brings its own signature: FSDP asks for it at every gather, and finding it takes long."""

    __slots__ = ("shard",)
    __signature__: ClassVar[Signature]

    def __init__(self, shard: AskedShard) -> None:
        self.shard = shard

    def __call__(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any) -> Any:
        with without_subclasses():  # a call for each attribute of a `Shard` would cost more than the attribute
            return self.shard.source.parts(self.shard, -(-outer_size[0] // mesh.size()), policy)


_Gather.__signature__ = signature(_Gather.__call__).replace(
    parameters=list(signature(_Gather.__call__).parameters.values())[1:]
)


def become_shard(tensor: Tensor, source: Source, *, asked: bool = True) -> None:
    """Makes the plain `tensor` a `Shard`, in place; FSDP and optimizers keep the object that they know."""
    if type(tensor) in (Tensor, *SHARDS):
        tensor.__class__ = AskedShard if asked else Shard
        tensor.source = source  # type: ignore[attr-defined]


def _plain(shard: Shard) -> Tensor:
    with without_subclasses():
        return shard.as_subclass(Tensor)


def _gathered(outputs: Any, metadata: Decodes | None, dtype: Any, *, out: Tensor | None = None) -> Any:
    (values,) = outputs if metadata is None else (metadata.decode(outputs, dtype),)
    if out is None:
        return values, (values,)
    out = local_part(out) if hasattr(out, "device_mesh") else out  # of a tensor parallel weight
    if out.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        with torch.no_grad(), keeping_version(out):
            out.copy_(values.view(-1)[: out.numel()].view(out.shape))
    return None
