"""Where every byte of a directory of safetensors files goes, before any of them is known. Nothing here touches a disk.

The bytes are those that safetensors 0.8 itself writes: tensors by type, then by name; a header padded to eight bytes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  #: a directory with more than this in tensors is sharded
FILE_TENSORS = 150_000  #: most tensors of one file; a directory with more is sharded

#: By the format's word for it, in the order in which safetensors writes them, the last first: NumPy's name, bytes of one.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
WORDS = {name: word for word, (name, _) in DTYPES.items()}  #: the inverse: by NumPy's name
_RANK = {word: rank for rank, word in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one tensor: its name, its type in the format's words (`BF16`, see `DTYPES`), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's data lies: `nbytes` bytes of `file` from `begin` on."""

    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole directory of weights.

    Attributes:
        headers: by file name, the bytes each begins with, length included.
        sizes: by file name, bytes of the whole file.
        places: by tensor name.
        index: the text of the index of shards, or None where one file holds all.
    """

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    index: str | None


def lay_out(slots: Iterable[Slot], *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> Layout:
    """The layout of `slots`, the same for the same slots in any order.

    Args:
        metadata: of every file's header: at most one key, since the format's metadata is an unordered map.
        shard_bytes: most bytes of tensors in one file; a tensor that is larger has a file to itself.
    """
    shards = _shards(sorted(slots, key=lambda slot: slot.name), shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    headers, sizes, places = {}, {}, {}
    for file, shard in zip(names, shards, strict=True):
        headers[file], offsets = _header(shard, metadata)
        sizes[file] = len(headers[file]) + sum(slot.nbytes for slot in shard)
        for slot in shard:
            places[slot.name] = Place(file, len(headers[file]) + offsets[slot.name], slot.nbytes)
    index = None
    if len(shards) > 1:
        total = sum(place.nbytes for place in places.values())
        table = {"metadata": {"total_size": total}, "weight_map": {name: places[name].file for name in sorted(places)}}
        index = json.dumps(table, indent=2, sort_keys=True) + "\n"
    return Layout(headers, sizes, places, index)


def _shards(slots: Sequence[Slot], most: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    room = most
    for slot in slots:
        if (slot.nbytes > room or len(shards[-1]) == FILE_TENSORS) and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(slot)
        room -= slot.nbytes
    return shards


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes a file begins with, and where after them each tensor does."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for slot in sorted(slots, key=lambda slot: (-_RANK[slot.dtype], slot.name)):
        begin, end = end, end + slot.nbytes
        offsets[slot.name] = begin
        table[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (begin, end)}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
