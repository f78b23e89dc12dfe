"""One output in parts: several processes or machines write whole weights files beside it, and one call joins them.

A part is a directory of its own, `.OUT.part-1-of-4`, written as every output: whole or not at all. `join` links the files of the
parts into the staging directory of the output, so that a kill at any moment leaves the parts or the output.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import ArtifactError, PlanError
from qkit.storage import swap
from qkit.storage.destination import check_directory
from qkit.storage.layout import INDEX, Layout
from qkit.storage.marks import SEAL, remove
from qkit.storage.read import read_json
from qkit.storage.seal import header_digest, read_seal
from qkit.storage.staging import Staging, unmark_companions, write_companion, write_synced
from qkit.storage.write import Output, blocks_of, digest_of, identity, seal_blocks

PART = "qkit-part.json"  #: the file of a part that says which part of which output it is


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 1 on, of `count`.

    Raises:
        PlanError: there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= 99_999:
            raise PlanError(f"part {self.number}/{self.count}: want 1/{self.count} to {self.count}/{self.count}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, out: Path) -> Path:
        """The directory of the part of the output `out`, a real path."""
        return out.with_name(f".{out.name}.part-{self.number}-of-{self.count}")

    def files(self, layout: Layout) -> list[str]:
        """The weights files of the part: consecutive ones, about as many as those of the others."""
        files = sorted(layout.headers)
        begin, end = (-(-at * len(files) // self.count) for at in (self.number - 1, self.number))
        return files[begin:end]


@dataclass(frozen=True, slots=True)
class Whole:
    """The output that parts belong to.

    Attributes:
        folder: the directory to write.
        layout: its weights files.
        files: its other files; see `Output`.
        source: text that identifies the source of the bytes.
    """

    folder: Path
    layout: Layout
    files: Mapping[str, bytes | Path]
    source: str

    def about(self, part: Part) -> dict[str, Any]:
        """The content of the part's `qkit-part.json`."""
        output = digest_of([identity(self.layout, self.files).encode()])
        return {
            "part": part.number,
            "parts": part.count,
            "source": digest_of([self.source.encode()]),
            "output": output,
        }


def part_output(whole: Whole, part: Part) -> Output:
    """The directory of a part, to write. Locks, resumes and fails as every `Output`.

    Raises:
        ArtifactError: the part is finished already; or the output is a mount point; or see `check_directory`.
    """
    out = _home(whole.folder)
    folder = part.folder(out)
    if (folder / SEAL).exists():
        _check(folder, part, whole)
        raise ArtifactError(f"part {part} is finished already, in {folder}: --finish joins the parts; or remove it")
    layout = whole.layout.only(part.files(whole.layout))
    about = (json.dumps(whole.about(part)) + "\n").encode()
    return Output(folder, layout, files={PART: about}, fingerprint=whole.source, like=out)


def join(whole: Whole) -> None:
    """Puts the output together from its parts, in one step, and removes them. The bytes are those of a single run.

    Raises:
        PlanError: a part is missing.
        ArtifactError: there is no part; or parts are of another count, source or recipe; or a file of a part has changed; or the
            staging directory has another run's work.
        LockedError: another process writes the output.
    """
    out = _home(whole.folder)
    found = _found(out)
    if found and _is_joined(out, found):  # a kill came before the parts were removed
        _remove(out, found)
        return
    parts = _check_all(out, found, whole)
    digests: dict[str, str] = {}
    for part in parts:
        digests.update(_check(part.folder(out), part, whole))
    if missing := whole.layout.places.keys() - digests.keys():
        raise ArtifactError(f"{whole.folder}: no part has {min(missing)}: remove the parts, and write them again")
    staging = Staging(check_directory(whole.folder))
    resumable = False
    try:
        staging.take()
        if staging.interrupted():
            resumable = True
            raise ArtifactError(f"{staging.folder} is from an interrupted run: repeat that run, or remove it")
        staging.clear()
        staging.start_journal("")
        staging.begin()
        for part in parts:
            for file in part.files(whole.layout):
                _link(part.folder(out) / file, staging.folder / file)
        index = {INDEX: whole.layout.index.encode()} if whole.layout.index else {}
        files = {**whole.files, **index}
        for name, content in files.items():
            write_companion(staging.folder, name, blocks_of(content))
        write_synced(staging.folder / SEAL, seal_blocks(whole.layout, files, digests))
        unmark_companions(staging.folder, files)
        swap.sync_folder(staging.folder)
        staging.put_in_place()
    finally:
        staging.release(keep=resumable)
    _remove(out, found)


def _home(folder: Path) -> Path:
    """The real path of the output, beside which its parts are."""
    place = check_directory(folder)
    if place.mounted:
        raise ArtifactError(
            f"{folder} is a mount point, and parts are written beside the output: choose a directory inside it, such as "
            f"{folder / 'model'}"
        )
    return place.path


def _found(out: Path) -> list[Part]:
    """The finished parts beside `out`."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.part-([1-9]\d{{0,4}})-of-([1-9]\d{{0,4}})")
    names = sorted(entry.name for entry in out.parent.iterdir()) if out.parent.is_dir() else []
    numbers = [(int(match[1]), int(match[2])) for name in names if (match := pattern.fullmatch(name))]
    parts = [Part(number, count) for number, count in sorted(numbers) if number <= count]
    return [part for part in parts if (part.folder(out) / SEAL).is_file()]


def _check_all(out: Path, found: Sequence[Part], whole: Whole) -> list[Part]:
    """All parts of one output, in order."""
    if not found:
        done = "; it is finished already" if (out / SEAL).exists() else ""
        raise PlanError(f"{whole.folder} has no finished parts beside it{done}: write them with --part I/N")
    counts = sorted({part.count for part in found})
    if len(counts) > 1:
        odd = next(part for part in found if part.count != found[0].count)
        raise ArtifactError(
            f"{found[0].folder(out)} is one of {found[0].count} parts, and {odd.folder(out)} one of {odd.count}: remove those "
            "that do not belong to this run"
        )
    numbers = {part.number for part in found}
    missing = [number for number in range(1, counts[0] + 1) if number not in numbers]
    if missing:
        names = [str(Part(number, counts[0])) for number in missing]
        raise PlanError(f"part {', '.join(names)} of {whole.folder} is missing, or not finished: run --part {names[0]}")
    return list(found)


def _check(folder: Path, part: Part, whole: Whole) -> Mapping[str, str]:
    """The digests of the tensors of a finished part, after a check of its mark and of its files' headers and sizes."""
    about, seal, wanted = read_json(folder / PART), read_seal(folder), whole.about(part)
    if about is None or seal is None:
        raise ArtifactError(f"{folder} is no part of an output: move it away, or choose another name for the output")
    for key, what in (("source", "another source"), ("output", "another recipe, shard size or version of qkit")):
        if about.get(key) != wanted[key]:
            raise ArtifactError(f"{folder} is of {what}: remove it, or repeat the command that wrote it")
    for file in part.files(whole.layout):
        sound = (folder / file).is_file() and (folder / file).stat().st_size == whole.layout.sizes[file]
        if not sound or header_digest(folder / file) != digest_of([whole.layout.headers[file]]):
            raise ArtifactError(
                f"{folder / file} has changed since it was written: remove {folder}, and run --part {part}"
            )
    return seal.tensors


def _is_joined(out: Path, found: Sequence[Part]) -> bool:
    """Whether a killed call has joined the parts already: it removes their own files, in all of them, first of all."""
    return (out / SEAL).is_file() and not all((part.folder(out) / PART).exists() for part in found)


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy on file systems without such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def _remove(out: Path, parts: Sequence[Part]) -> None:
    with suppress(OSError):  # the output is whole: parts that stay only take room
        for part in parts:
            (part.folder(out) / PART).unlink(missing_ok=True)
        for part in parts:
            remove(part.folder(out))
