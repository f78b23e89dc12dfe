"""Whether a directory is still the one that qkit wrote: `qkit.json` in it has its files and a SHA-256 of every tensor."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkit.errors import ArtifactError
from qkit.storage.marks import SEAL
from qkit.storage.place_writer import CHUNK
from qkit.storage.read import INDEX_BYTES, Stored, inside, is_pickle, read_json

AGAIN: Final = "quantize or save the model again"
KEYS: Final = {
    "files": list,
    "headers": dict,
    "tensors": dict,
}  #: of the file; what it has beyond these qkit does not know


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file or a tensor, and the way out."""

    where: str
    what: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Seal:
    """The content of `qkit.json`.

    Attributes:
        files: names of the files that qkit wrote.
        headers: SHA-256 of the header of each weights file, its length included.
        tensors: SHA-256 of the bytes of each tensor.
    """

    files: tuple[str, ...]
    headers: Mapping[str, str]
    tensors: Mapping[str, str]


def read_seal(folder: Path) -> Seal | None:
    """The seal of `folder`; None where there is none: another program wrote it.

    Raises:
        ArtifactError: the file is not what qkit writes.
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


def check_seal(folder: Path, tensors: Mapping[str, Stored], *, digests: bool) -> None:
    """Compares `folder` with its seal, if it has one. Costs one pass over the weights where `digests` are compared too.

    The pass leaves the bytes in the system's cache, from which the caller then reads what fits into memory.

    Raises:
        ArtifactError: something is not what was written.
    """
    seal = read_seal(folder)
    if seal is None:
        return
    for problem in file_problems(folder, seal):
        raise ArtifactError(str(problem))
    for problem in tensor_problems(folder, seal, tensors, digests=digests):
        raise ArtifactError(str(problem))


def file_problems(folder: Path, seal: Seal) -> Iterator[Problem]:
    """Files that are missing, weights files that are too many, headers that have changed."""
    for name in seal.files:
        if not (folder / name).is_file():
            yield Problem(str(folder / name), "is missing")
    for entry in sorted(folder.iterdir()):
        if (entry.suffix == ".safetensors" or is_pickle(entry.name)) and entry.name not in seal.files:
            yield Problem(str(entry), "is a weights file that qkit did not write, and readers may open it", "remove it")
    for name, digest in seal.headers.items():
        if (folder / name).is_file() and _header_digest(folder / name) != digest:
            yield Problem(str(folder / name), "its header is not the one that was written")


def tensor_problems(
    folder: Path, seal: Seal, tensors: Mapping[str, Stored], *, digests: bool = True
) -> Iterator[Problem]:
    """Tensors that are missing or too many and, where `digests` are compared, those whose bytes have changed."""
    common = [name for name in sorted(tensors) if digests and name in seal.tensors]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and reading both let go of the interpreter
        found = dict(zip(common, pool.map(lambda name: _digest(tensors[name]), common), strict=True))
    for name in sorted(seal.tensors.keys() | tensors.keys()):
        if name not in tensors:
            yield Problem(str(folder), f"{name} is missing")
        elif name not in seal.tensors:
            yield Problem(f"{tensors[name].file}: {name}", "was not written by qkit")
        elif digests and found[name] != seal.tensors[name]:
            yield Problem(f"{tensors[name].file}: {name}", "its bytes are not those that were written")


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name.isprintable()


def _header_digest(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
        return hashlib.sha256(
            start + stream.read(min(int.from_bytes(start, "little"), file.stat().st_size))
        ).hexdigest()


def _digest(stored: Stored) -> str:
    found = hashlib.sha256()
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        left = stored.slot.nbytes
        while left and (data := stream.read(min(CHUNK, left))):
            found.update(data)
            left -= len(data)
    return found.hexdigest()
