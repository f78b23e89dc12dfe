"""The tensors of a snapshot as mlx-lm names them: stacked experts, and those that its `sanitize` would change itself."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError
from qkit.experts import Member, member_of
from qkit.formats import mlx_lm
from qkit.formats.mlx_config import place_of, stack_path, to_mlx_name
from qkit.formats.mlx_families import Family
from qkit.formats.packed import Tensors, join
from qkit.storage.arrays import array_stream
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.write import Stream

JOINED, DOWN = ".experts.gate_up_proj_bias", ".experts.down_proj_bias"  #: names of biases of experts in files
#: Ends of the names of norms that count from one in mlx-lm and from zero in transformers, where a family `shifts`.
SHIFTED: Final = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)

Stacks = dict[str, dict[int, StoredWeight]]


def check_tensors(source: Snapshot, family: Family) -> None:
    """Checks that mlx-lm reads every tensor of `source` that changes results.

    Raises:
        ArtifactError: it ignores one; the message names it.
    """
    for name, array in source.tensors.items():
        if name.endswith(family.ignored) and np.any(array):
            raise ArtifactError(
                f"{source.folder}: mlx-lm ignores {name}, whose numbers choose experts: export --to dense"
            )


def stacks_of(weights: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> Stacks:
    """The weights of single experts, by the path of their stack in mlx-lm, then by number.

    Raises:
        ArtifactError: an expert of a stack is missing, or its experts are on several grids.
    """
    out: Stacks = {}
    for path, weight in weights.items():
        place, number = place_of(path, config)
        if number is not None:
            out.setdefault(place, {})[number] = weight
    for place, experts in out.items():
        if missing := set(range(len(experts))) - experts.keys():
            raise ArtifactError(
                f"{place}: expert {min(missing)} is missing, and mlx-lm has all experts in one tensor: export --to dense"
            )
        if len({(one.rule.weight, one.dtype, one.shape, one.kind) for one in experts.values()}) > 1:
            raise ArtifactError(
                f"{place}: the experts are on several grids, and mlx-lm has one for all of a stack: export --to dense"
            )
    return out


def stack_streams(stacks: Stacks) -> Iterable[Stream]:
    """The tensors of stacked experts, whose codes and scales are packed expert by expert when they are written."""
    for place, experts in stacks.items():
        first = experts[0]
        assert first.rule.weight is not None
        contents = mlx_lm.contents(first.rule.weight, dtype=first.dtype, shape=first.shape, kind=first.kind or None)
        for name, (kind, shape) in contents.items():
            slot = Slot(join(place, name), TYPE_NAMES[kind], (len(experts), *shape))
            yield Stream(slot, _blocks(place, [experts[number] for number in range(len(experts))], name))


def tensor_streams(tensors: Tensors, config: Mapping[str, Any], family: Family) -> Iterable[Stream]:
    """All other tensors under mlx-lm's names; float experts are stacked."""
    for name, array in _renamed(tensors, config, family):
        yield array_stream(name, array)
    yield from _float_stacks(tensors, config)


def _float_stacks(tensors: Tensors, config: Mapping[str, Any]) -> Iterable[Stream]:
    """The weights of float experts, stacked."""
    found: dict[str, list[tuple[int, Callable[[], NDArray[Any]], NDArray[Any], tuple[int, int]]]] = {}
    for name, array in tensors.items():
        member = member_of(name, array.shape, config)
        for number, projection in member.paths if member else ():
            assert member is not None
            place = stack_path(member.block, projection, config)

            def read(
                member: Member = member, array: NDArray[Any] = array, number: int = number, projection: str = projection
            ) -> NDArray[Any]:
                return np.ascontiguousarray(member.matrix(array, number, projection))

            found.setdefault(place, []).append((number, read, array, member.shape))
    for place, parts in found.items():
        ordered = sorted(parts, key=lambda part: part[0])
        _, _, array, shape = ordered[0]
        if [part[0] for part in ordered] != list(range(len(ordered))) or any(part[3] != shape for part in ordered):
            raise ArtifactError(
                f"{place}: experts are missing or differ, and mlx-lm has all of them in one tensor: export --to dense"
            )
        slot = Slot(f"{place}.weight", TYPE_NAMES[array.dtype.name], (len(ordered), *shape))
        yield Stream(slot, _float_blocks([part[1] for part in ordered]))


def _float_blocks(reads: list[Callable[[], NDArray[Any]]]) -> Callable[[], Iterable[memoryview]]:
    return lambda: (read().reshape(-1).view(np.uint8).data for read in reads)


def _renamed(tensors: Tensors, config: Mapping[str, Any], family: Family) -> Iterable[tuple[str, NDArray[Any]]]:
    for name, array in tensors.items():
        if member_of(name, array.shape, config):
            continue
        if family.biases and name.endswith(JOINED):
            place = name.removesuffix(JOINED)
            yield f"{place}.{family.stack}.gate_proj.bias", np.ascontiguousarray(array[:, ::2])
            yield f"{place}.{family.stack}.up_proj.bias", np.ascontiguousarray(array[:, 1::2])
        elif family.biases and name.endswith(DOWN):
            yield f"{name.removesuffix(DOWN)}.{family.stack}.down_proj.bias", array
        elif family.shifts:
            if "mtp." not in name:
                yield name, _shifted(name, array)
        else:
            yield to_mlx_name(name, config), array


def _shifted(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if "conv1d.weight" in name and array.ndim == 3:
        return np.ascontiguousarray(np.moveaxis(array, 2, 1))
    return array + array.dtype.type(1) if name.endswith(SHIFTED) and array.ndim == 1 else array


def _blocks(place: str, experts: list[StoredWeight], name: str) -> Callable[[], Iterable[memoryview]]:
    def blocks() -> Iterable[memoryview]:
        for weight in experts:
            try:
                block = mlx_lm.store(weight.read())[name]
            except ArtifactError as error:
                raise ArtifactError(f"{place}: {error}") from None
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data

    return blocks
