"""Directories of safetensors files from anywhere: every header is checked before use, and no tensor is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.intake import TEXT_BYTES, check_regular, parse_json, parse_table, read_text
from qkit.storage import other_models
from qkit.storage.layout import DTYPES, FILE_TENSORS, INDEX, SINGLE, Slot
from qkit.storage.other_models import GGUF

TENSORS: Final = 500_000  #: most tensors of a directory; the largest known models have 211,000
HEADER_BYTES: Final = 100_000_000  #: most bytes of a header, by the format's own rule
METADATA_BYTES: Final = 1 << 24  #: most bytes of the metadata in a header: 16.8 MB
INDEX_BYTES: Final = 1 << 28  #: most bytes of an index of shards, or of a list of digests: 268 MB
NAME: Final = 1000  #: most characters of a tensor's name
AXES: Final = 16  #: most axes of a tensor
NUMBERS: Final = 1 << 60  #: a tensor has fewer numbers than this, with axes of 0 counted as 1
FEWER: Final = "stack them, or split the model"


class MissingError(ArtifactError):
    """A file or tensor that the directory lists is missing."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its slot, and the offset of its data."""

    slot: Slot
    file: Path
    begin: int

    def mapped(self) -> NDArray[Any]:
        """The values, mapped read-only. Raises as `map_tensors`."""
        return map_tensors({"": self})[""]

    def read(self) -> NDArray[Any]:
        """The values, read into memory: for small tensors, of which a model has many."""
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            return np.frombuffer(stream.read(self.slot.nbytes), DTYPES[self.slot.dtype][0]).reshape(self.slot.shape)


def map_tensors(tensors: Mapping[str, Stored]) -> dict[str, NDArray[Any]]:
    """The values of `tensors`, mapped read-only: one map for each file, since systems limit how many files are open.

    Raises:
        ArtifactError: a byte of a tensor of booleans is neither 0 nor 1.
    """
    import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8

    files: dict[Path, NDArray[np.uint8]] = {}
    out: dict[str, NDArray[Any]] = {}
    for name, stored in tensors.items():
        slot, end = stored.slot, stored.begin + stored.slot.nbytes
        if not slot.nbytes:
            out[name] = np.empty(slot.shape, DTYPES[slot.dtype][0])
            continue
        if stored.file not in files:
            files[stored.file] = np.memmap(stored.file, np.uint8, mode="r").view(np.ndarray)
        data = files[stored.file][stored.begin : end]
        if slot.dtype == "BOOL":
            check_bools(data, name=f"{stored.file}: {slot.name}")
        out[name] = data.view(DTYPES[slot.dtype][0]).reshape(slot.shape)
    return out


def read_folder(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a folder with one file or with an index of shards, and the metadata of the first file that has any.

    Raises:
        ArtifactError: a file is unsound, a pickle, outside of the folder, or not in the index; or two files have one tensor.
        MissingError: the folder, a shard or a tensor is missing.
    """
    if not folder.is_dir():
        if folder.name.lower().endswith(GGUF) and folder.is_file():
            raise MissingError(other_models.gguf(folder))
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
        if len(tensors) + len(found) > TENSORS:
            raise ArtifactError(f"{folder} has more than {TENSORS:,} tensors, and qkit opens no larger models: {FEWER}")
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
    """The tensors of one file and its header's metadata, after safetensors' own checks of header, offsets and sizes.

    Raises:
        ArtifactError: the file is no sound safetensors file, or has a tensor twice or of a type that qkit does not read.
        MissingError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open  # here, so that `import qkit` stays cheap

    if not file.exists():
        raise MissingError(f"{file} is missing: fetch it again")
    size = check_regular(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= min(size - 8, HEADER_BYTES) else b""
    try:
        with safe_open(file, framework="np") as opened:
            metadata = dict(opened.metadata() or {})
        table = parse_table(header)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file}: {error}: fetch it again") from None
    if sum(len(key) + len(value) for key, value in metadata.items()) > METADATA_BYTES:
        raise ArtifactError(
            f"{file} has more than {METADATA_BYTES:,} bytes of metadata: remove them, or fetch it again"
        )
    table.pop("__metadata__", None)
    if len(table) > FILE_TENSORS:
        raise ArtifactError(
            f"{file} has {len(table):,} tensors, and qkit opens at most {FILE_TENSORS:,} in a file: {FEWER}"
        )
    tensors = {}
    for name, entry in table.items():
        _check_entry(name, entry, file)
        slot = Slot(name, entry["dtype"], tuple(entry["shape"]))
        tensors[name] = Stored(slot, file, 8 + length + entry["data_offsets"][0])
    return tensors, metadata


def _check_entry(name: str, entry: Mapping[str, Any], file: Path) -> None:
    """Refuses names, types and shapes that no model has, or that other programs would fail on."""
    if not name or len(name) > NAME or not name.isprintable():
        raise ArtifactError(f"{file}: {name[:NAME]!r} is no name of a tensor: want 1 to {NAME:,} printable characters")
    if name[0] in "/\\" or ".." in name.replace("\\", "/").split("/"):
        raise ArtifactError(
            f"{file}: the name {name!r} is a path out of the folder, where tensors are written to files"
        )
    if entry["dtype"] not in DTYPES:
        raise ArtifactError(f"{file}: {name} is {entry['dtype']}, which qkit does not read: cast or drop it")
    shape = entry["shape"]
    if len(shape) > AXES or prod(max(n, 1) for n in shape) >= NUMBERS:
        raise ArtifactError(f"{file}: {name} has the shape {shape!r:.200}: want at most {AXES} axes and 2^60 numbers")


def check_bools(data: NDArray[np.uint8], *, name: str) -> None:
    """Checks the bytes of the booleans in tensor `name`.

    Raises:
        ArtifactError: a byte is neither 0 nor 1, so that programs disagree on its value.
    """
    if data.size and data.max() > 1:
        place = int(np.argmax(data > 1))
        raise ArtifactError(f"{name} holds the byte {int(data[place])} at {place}, which is no boolean: fetch it again")


def read_json(file: Path, *, most: int = TEXT_BYTES, parse_int: Callable[[str], float] = int) -> dict[str, Any] | None:
    """The object in a JSON file of at most `most` bytes; None where there is no file.

    Args:
        parse_int: returns the value of a whole number.

    Raises:
        ArtifactError: the file is no regular file, is too long, is no JSON object, or has a key twice.
        OSError: the file cannot be read.
    """
    if not file.exists():
        return None
    try:
        table = parse_json(read_text(file, most=most), parse_int=parse_int)
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{file}: not a JSON object ({error}): fetch it again") from None
    if not isinstance(table, dict):
        raise ArtifactError(f"{file}: not a JSON object but a {type(table).__name__}: fetch it again")
    return table


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which has to lie there or, as a link, in the blobs of Hugging Face's cache.

    Raises:
        ArtifactError: `name` is a path, or the file is a link to another place or to nothing.
    """
    if Path(name).name != name or not name.isprintable():
        raise ArtifactError(f"{folder / INDEX}: {name!r} is not a file of this folder: mend the index")
    return checked_link(folder / name, root=folder)


def checked_link(file: Path, *, root: Path) -> Path:
    """`file`, which has to lie in its own directory or, as a link, in the blobs of Hugging Face's cache of the model in `root`.

    Raises:
        ArtifactError: it is a link to another place or to nothing.
    """
    home = root.resolve()
    if file.is_symlink() and not file.exists():
        raise ArtifactError(f"{file} is a link to nothing, or to itself: put the file itself there")
    homes = {file.parent.resolve()}
    if home.parent.name == "snapshots":  # read off huggingface_hub 2.4: snapshots/REVISION/FILE links to blobs/DIGEST
        homes.add(home.parent.parent / "blobs")
    if file.resolve().parent not in homes:
        raise ArtifactError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")
    return file


def _index(file: Path) -> dict[str, str]:
    table = read_json(inside(file.parent, file.name), most=INDEX_BYTES) or {}
    places = table.get("weight_map")
    if isinstance(places, Mapping) and len(places) > TENSORS:
        raise ArtifactError(f"{file} names {len(places):,} tensors, and qkit opens at most {TENSORS:,}: {FEWER}")
    if not isinstance(places, Mapping) or not all(isinstance(shard, str) for shard in places.values()) or not places:
        raise ArtifactError(f"{file}: not an index of shards: weight_map has to name a file for every tensor")
    for name, shard in places.items():
        if not shard.endswith(".safetensors"):
            raise ArtifactError(f"{file}: {name} is in {shard!r}, which is no safetensors file: qkit opens no other")
    return dict(places)


def _no_weights(folder: Path, strays: list[str]) -> str:
    if strays:
        return f"{folder} has {strays[0]} but no {INDEX}, which lists the files of the model: fetch it"
    if sentence := other_models.sentence(folder):
        return sentence
    return f"{folder} has neither {SINGLE} nor {INDEX}: name the directory of a model"
