"""A directory of safetensors files as it is found: hostile until checked. Headers are read, and no tensor."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.storage.layout import DTYPES, INDEX, SINGLE, Slot

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class MissingError(ArtifactError):
    """A part that the directory itself says it has is not there."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its slot, and where its data begins."""

    slot: Slot
    file: Path
    begin: int

    def mapped(self) -> NDArray[Any]:
        """Its values, mapped read-only."""
        import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8

        dtype = np.dtype(DTYPES[self.slot.dtype][0])
        if not self.slot.nbytes:
            return np.empty(self.slot.shape, dtype)
        data = np.memmap(self.file, np.uint8, mode="r", offset=self.begin, shape=(self.slot.nbytes,))
        return data.view(np.ndarray).view(dtype).reshape(self.slot.shape)


def read_folder(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a folder with one file or with an index of shards, and the metadata of the first file that has any.

    Raises:
        ArtifactError: a file is unsound, a pickle, outside of the folder, or on no list; or a tensor stands twice.
        MissingError: the folder, a shard or a tensor is missing.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder} is no directory: name one with {SINGLE} or {INDEX} in it")
    places = _index(folder / INDEX) if (folder / INDEX).exists() else None
    shards = sorted(set(places.values())) if places is not None else [SINGLE]
    strays = sorted(entry.name for entry in folder.glob("model*.safetensors") if entry.name not in shards)
    if places is None and not (folder / SINGLE).exists():
        raise MissingError(_no_weights(folder, strays))
    if strays:
        raise ArtifactError(
            f"{folder / strays[0]} is not in {INDEX if places else 'use'}: a reader that goes by file names would mix it in; "
            "remove it"
        )
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        found, extra = read_file(inside(folder, shard))
        metadata = metadata or extra
        for name, stored in found.items():
            if places is not None and places.get(name) != shard:
                where = f"the index puts it in {places[name]}" if name in places else "the index does not have it"
                raise ArtifactError(f"{folder / shard}: {name} stands here, but {where}: remove one of them")
            tensors[name] = stored
    for name, shard in (places or {}).items():
        if name not in tensors:
            raise MissingError(f"{folder / INDEX}: {name} is not in {shard}: fetch that file again")
    return tensors, metadata


def read_file(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one file and its header's metadata, after safetensors' own checks: header, offsets, overlaps, sizes.

    Raises:
        ArtifactError: it is not a sound safetensors file, or holds a tensor twice or of a type that qkit does not read.
        MissingError: there is none.
    """
    from safetensors import SafetensorError, safe_open  # here, so that `import qkit` stays cheap

    if not file.exists():
        raise MissingError(f"{file} is missing: fetch it again")
    try:
        with safe_open(file, framework="np") as opened:
            metadata = dict(opened.metadata() or {})
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file}: {error}: fetch it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ArtifactError(f"{file}: {name} is {entry['dtype']}, which qkit does not read: cast or drop it")
        slot = Slot(name, entry["dtype"], tuple(entry["shape"]))
        tensors[name] = Stored(slot, file, 8 + length + entry["data_offsets"][0])
    return tensors, metadata


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        ArtifactError: it holds anything else, or a key twice.
    """
    if not file.exists():
        return None
    try:
        table = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{file}: not a JSON object ({error}): fetch it again") from None
    if not isinstance(table, dict):
        raise ArtifactError(f"{file}: not a JSON object but a {type(table).__name__}: fetch it again")
    return table


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, where it is one that lies there, or in the blobs of the hub's cache.

    Raises:
        ArtifactError: it is a path, or a link to somewhere else.
    """
    file, home = folder / name, folder.resolve()
    if Path(name).name != name:
        raise ArtifactError(f"{folder / INDEX}: {name!r} is not a file of this folder: mend the index")
    homes = {home}
    if home.parent.name == "snapshots":  # read off huggingface_hub 2.4: snapshots/REVISION/FILE links to blobs/DIGEST
        homes.add(home.parent.parent / "blobs")
    if file.resolve().parent not in homes:
        raise ArtifactError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")
    return file


def is_pickle(name: str) -> bool:
    """Whether a file of this name would run code when it is read."""
    return name.endswith(PICKLES)


def _index(file: Path) -> dict[str, str]:
    table = read_json(inside(file.parent, file.name)) or {}
    places = table.get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(shard, str) for shard in places.values()) or not places:
        raise ArtifactError(f"{file}: not an index of shards: weight_map has to name a file for every tensor")
    for name, shard in places.items():
        if not shard.endswith(".safetensors"):
            raise ArtifactError(f"{file}: {name} is in {shard!r}, which is no safetensors file: qkit opens no other")
    return dict(places)


def _no_weights(folder: Path, strays: list[str]) -> str:
    if strays:
        return f"{folder} has {strays[0]} but no {INDEX}, which says what belongs together: fetch it"
    pickles = sorted(entry.name for entry in folder.iterdir() if is_pickle(entry.name))
    if pickles:
        return (
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code: qkit opens none; let the model's publisher "
            "or a machine that you can lose write it as safetensors"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}: name the directory of a model"


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} stands twice")
        table[key] = value
    return table
