"""The layout of a directory of safetensors files: the place of every byte, from names, types and shapes. Touches no disk.

The bytes equal those of safetensors 0.8: tensors sorted by type, then by name, after a header padded to eight bytes.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  #: a directory with more than this in tensors is sharded
FILE_TENSORS = 150_000  #: most tensors of one file; a directory with more is sharded

#: Types by safetensors' name: NumPy's name, and bytes of one number. safetensors writes tensors in the reverse order.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
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
TYPE_NAMES = {name: stored for stored, (name, _) in DTYPES.items()}  #: safetensors' names of types, by NumPy's
_RANK = {stored: rank for rank, stored in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a file, without its data: name, type as safetensors names it (`BF16`, see `DTYPES`), and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a tensor's data: `nbytes` bytes of `file`, from `begin` on."""

    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole directory of weights.

    Attributes:
        headers: first bytes of each file, length included, by file name.
        sizes: bytes of each whole file, by file name.
        places: place of each tensor's data, by tensor name.
        index: text of the index of shards; None where there is one file.
    """

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    index: str | None

    def only(self, files: Collection[str]) -> "Layout":
        """The layout of `files` alone, without an index."""
        return Layout(
            {file: header for file, header in self.headers.items() if file in files},
            {file: size for file, size in self.sizes.items() if file in files},
            {name: place for name, place in self.places.items() if place.file in files},
            None,
        )


def lay_out(slots: Iterable[Slot], *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES) -> Layout:
    """The layout of `slots`. The order of the slots does not matter.

    Args:
        metadata: metadata of every file's header, at most one key: the format stores an unordered map.
        shard_bytes: most bytes of tensors in one file. A larger tensor gets a file of its own.
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
    left = most
    for slot in slots:
        if (slot.nbytes > left or len(shards[-1]) == FILE_TENSORS) and shards[-1]:
            shards.append([])
            left = most
        shards[-1].append(slot)
        left -= slot.nbytes
    return shards


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and the offset of each tensor after them."""
    entries = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    offsets, end = {}, 0
    for slot in sorted(slots, key=lambda slot: (-_RANK[slot.dtype], slot.name)):
        begin, end = end, end + slot.nbytes
        offsets[slot.name] = begin
        shape = ",".join(map(str, slot.shape))  # text at once: tables for 100,000 tensors would take 100 MB
        entries.append(
            f'{_json(slot.name)}:{{"dtype":"{slot.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}'
        )
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
