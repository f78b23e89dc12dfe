"""The seal `qkit.json` of a directory: the files that qkit wrote and a SHA-256 of every tensor, read and compared."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from qkit.errors import ArtifactError
from qkit.storage.batches import batches, in_threads
from qkit.storage.marks import SEAL
from qkit.storage.other_models import is_pickle
from qkit.storage.read import INDEX_BYTES, Stored, inside, read_json
from qkit.storage.tensor_writer import CHUNK, PIECE

AGAIN: Final = "quantize or save the model again"
KEYS: Final = {
    "files": list,
    "headers": dict,
    "tensors": dict,
}  #: the keys of the file, and no others


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of a file or a tensor, and the way out."""

    where: str
    fault: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.where}: {self.fault}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Seal:
    """The content of `qkit.json`.

    Attributes:
        files: names of the files that qkit wrote.
        headers: SHA-256 of the header of each weights file, length included.
        tensors: SHA-256 of the bytes of each tensor.
    """

    files: tuple[str, ...]
    headers: Mapping[str, str]
    tensors: Mapping[str, str]


def read_seal(folder: Path) -> Seal | None:
    """The seal of `folder`; None in a directory of another program, which has no seal.

    Raises:
        ArtifactError: the file is no seal of qkit's.
    """
    table = read_json(inside(folder, SEAL), most=INDEX_BYTES)
    if table is None:
        return None
    sound = table.keys() == KEYS.keys() and all(type(table[key]) is kind for key, kind in KEYS.items())
    names = [*table["files"], *table["headers"].values(), *table["tensors"].values()] if sound else [None]
    files = [*table["files"], *table["headers"]] if sound else []
    if not all(isinstance(name, str) for name in names) or not all(map(_is_file_name, files)):
        raise ArtifactError(f"{folder / SEAL}: not what qkit writes, which is {', '.join(KEYS)}: {AGAIN}")
    return Seal(tuple(table["files"]), table["headers"], table["tensors"])


def check_seal(folder: Path, tensors: Mapping[str, Stored], *, digests: bool) -> Mapping[str, str]:
    """Compares `folder` with its seal, if it has one.

    With `digests`, one pass reads every byte of the weights. The bytes stay in the system's cache for the caller.

    Returns:
        The digests by the name of their tensor, compared only with `digests`; empty without a seal.

    Raises:
        ArtifactError: a file or tensor differs from the seal.
    """
    seal = read_seal(folder)
    if seal is None:
        return {}
    for problem in file_problems(folder, seal):
        raise ArtifactError(str(problem))
    for problem in tensor_problems(folder, seal, tensors, digests=digests):
        raise ArtifactError(str(problem))
    return seal.tensors


def file_problems(folder: Path, seal: Seal) -> Iterator[Problem]:
    """Missing files, additional weights files, and changed headers."""
    for name in seal.files:
        if not (folder / name).is_file():
            yield Problem(str(folder / name), "is missing")
    for entry in sorted(folder.iterdir()):
        if (entry.suffix == ".safetensors" or is_pickle(entry.name)) and entry.name not in seal.files:
            yield Problem(str(entry), "is a weights file that qkit did not write, and readers may open it", "remove it")
    for name, digest in seal.headers.items():
        if (folder / name).is_file() and header_digest(folder / name) != digest:
            yield Problem(str(folder / name), "its header is not the one that was written")


def tensor_problems(
    folder: Path, seal: Seal, tensors: Mapping[str, Stored], *, digests: bool = True
) -> Iterator[Problem]:
    """Missing and additional tensors and, with `digests`, tensors whose bytes have changed."""
    common = [name for name in sorted(tensors) if digests and name in seal.tensors]
    found = digests_of([tensors[name] for name in common])
    for name in sorted(seal.tensors.keys() | tensors.keys()):
        if name not in tensors:
            yield Problem(str(folder), f"{name} is missing")
        elif name not in seal.tensors:
            yield Problem(f"{tensors[name].file}: {name}", "was not written by qkit")
        elif digests and found[name] != seal.tensors[name]:
            yield changed(tensors[name])


def changed(stored: Stored) -> Problem:
    """The problem of a tensor whose bytes have changed."""
    return Problem(f"{stored.file}: {stored.slot.name}", "its bytes are not those that were written")


DEEPEST = 16  #: parts of the name of a file in directories


def _is_file_name(name: str) -> bool:
    """Whether `name` is that of a file, here or in a directory below, and leads nowhere else."""
    parts = name.split("/")
    return (
        len(parts) <= DEEPEST
        and all(part and part == Path(part).name and part != ".." for part in parts)
        and name.isprintable()
    )


def header_digest(file: Path) -> str:
    """SHA-256 of the header of a weights file, length included."""
    with file.open("rb") as stream:
        start = stream.read(8)
        return hashlib.sha256(
            start + stream.read(min(int.from_bytes(start, "little"), file.stat().st_size))
        ).hexdigest()


def digests_of(tensors: Sequence[Stored]) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor, by name. Works on all cores: hashing and reading release the interpreter lock."""
    files = sorted({stored.file for stored in tensors})
    ordered = sorted(tensors, key=lambda stored: (stored.file, stored.begin))
    with ExitStack() as stack:
        opened = {file: stack.enter_context(file.open("rb")).fileno() for file in files}
        some = batches(ordered, lambda stored: stored.slot.nbytes)
        found = in_threads(lambda batch: _digests(batch, opened), some)
    return dict(zip((stored.slot.name for stored in ordered), chain.from_iterable(found), strict=True))


def _digests(batch: Sequence[Stored], opened: Mapping[Path, int]) -> list[str]:
    """The digest of each tensor of a batch. Small neighbors are read together: threads wait for each other at each call."""
    first, last = batch[0], batch[-1]
    length = last.begin + last.slot.nbytes - first.begin
    if first.file != last.file or length > CHUNK:
        return [_digest(stored, opened[stored.file]) for stored in batch]
    data = memoryview(os.pread(opened[first.file], length, first.begin))
    begins = [stored.begin - first.begin for stored in batch]
    ends = [begin + stored.slot.nbytes for begin, stored in zip(begins, batch, strict=True)]
    return [hashlib.sha256(data[begin:end]).hexdigest() for begin, end in zip(begins, ends, strict=True)]


def _digest(stored: Stored, descriptor: int) -> str:
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, stored.slot.nbytes)))  # in the cache
    begin, end = stored.begin, stored.begin + stored.slot.nbytes
    while begin < end and (length := os.preadv(descriptor, [buffer[: end - begin]], begin)):
        found.update(buffer[:length])
        begin += length
    return found.hexdigest()
