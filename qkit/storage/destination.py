"""The place of an output: the real path behind every link, and the checks that need no work on the model."""

import os
from dataclasses import dataclass
from pathlib import Path

from qkit.errors import ArtifactError, PlanError
from qkit.storage.marks import (
    PLACING,
    SEAL,
    check_journal,
    check_own,
    check_replaceable,
    is_marked,
    sealed,
    strangers_in,
    tops,
)

NAME_BYTES, PATH_BYTES = 255, 4095  #: longest name and path, where the system states no limit
RESERVED = len(
    ".model-00001-of-00001.safetensors.index.json.writing"
)  #: longest name that qkit adds to an output's path
FRESH = frozenset(("lost+found",))  #: entries of a new, empty volume
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Destination:
    """The place of an output.

    Attributes:
        requested: the path that the caller named, for messages.
        path: the real path, absolute and without links.
        mounted: whether `path` is a mount point. No rename can replace a mount point, so files are staged inside it.
    """

    requested: Path
    path: Path
    mounted: bool

    @property
    def aside(self) -> Path:
        """The staging directory, where qkit writes before the output takes its place."""
        return self._near("writing")

    @property
    def journal(self) -> Path:
        """The journal file: the lock of the place, and the record of finished tensors."""
        return self._near("journal")

    @property
    def previous(self) -> Path:
        """Name of the old directory during the exchange, on file systems that cannot exchange two directories in one step."""
        return self._near("old")

    def _near(self, ending: str) -> Path:
        if self.mounted:
            return self.path / f".qkit.{ending}"
        return self.path.with_name(f".{self.path.name}.{ending}")


def destination(out: str | Path) -> Destination:
    """The place that the path `out` names. Resolves links, finds mount points, and checks names.

    Raises:
        ArtifactError: `out` is no name for a file or directory, is too long, or is a link that leads nowhere.
    """
    requested = Path(out)
    _check_name(requested)
    whole = requested.absolute()
    for part in (whole, *whole.parents):
        if os.path.islink(part) and not os.path.exists(part):
            target = Path(os.path.realpath(part))
            if os.path.islink(target) or not os.path.isdir(target.parent):
                raise ArtifactError(
                    f"{part} is a link to {os.readlink(part)}, and there is no {target.parent}: make that directory or "
                    "mount its disk, or choose another name"
                )
    path = Path(os.path.realpath(whole))
    if not path.name:
        raise ArtifactError(f"{requested} is no name for a directory: choose one of its own")
    return Destination(requested, path, is_mount(path))


def check_directory(out: str | Path) -> Destination:
    """The place of the directory `out`, which qkit may write or replace.

    Raises:
        ArtifactError: see `destination`; `out` is a file, is inside a file, has entries that qkit did not write, or is a mount
            point with a model in it; or another program uses a name beside `out` that qkit needs.
        PlanError: the disk is read-only, or this user may not write there.
    """
    place = destination(out)
    check_place(place)
    return place


def check_place(place: Destination) -> None:
    """As `check_directory`, for a resolved place."""
    _check_parents(place)
    _check_near(place)
    check_content(place)


def check_file(out: str | Path) -> Destination:
    """As `check_directory`, for a new file.

    Raises:
        ArtifactError: `out` exists; or see `check_directory`.
        PlanError: see `check_directory`.
    """
    place = destination(out)
    if os.path.lexists(place.path):
        raise ArtifactError(f"{out} exists: remove it, or choose another name")
    return check_replaced_file(out)


def check_replaced_file(out: str | Path) -> Destination:
    """As `check_file`, for a file that may exist already.

    Raises:
        ArtifactError, PlanError: see `check_directory`.
    """
    place = destination(out)
    if place.path.is_dir():
        raise ArtifactError(f"{out} is a directory: choose another name")
    _check_parents(place)
    _check_near(place)
    return place


def check_writable(file: Path) -> None:
    """Checks that `file` can be written, as far as its parents tell.

    Raises:
        ArtifactError: a parent is a file.
        PlanError: the disk is read-only, or this user may not write there.
    """
    _check_writable(existing_parent(file), file)


def check_content(place: Destination) -> None:
    """Checks that every entry of `place` is one that qkit wrote. Called again when the new content is complete.

    Raises:
        ArtifactError: see `check_directory`.
    """
    if not place.mounted:
        try:
            check_replaceable(place.path)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(place.path), str(place.requested), 1)) from None
        return
    moved = set(_moved(place))
    ours = {place.aside.name, place.journal.name, *moved, *FRESH}
    strangers = sorted(entry.name for entry in os.scandir(place.path) if entry.name not in ours)
    if not strangers:
        return
    way_out = f"choose a directory inside it, such as {place.requested / 'model'}"
    if (place.path / SEAL).is_file() and {*strangers} <= tops({*sealed(place.path), SEAL}):
        raise ArtifactError(
            f"{place.requested} is a mount point and holds a model, which cannot be replaced in one step: remove that, or "
            f"{way_out}"
        )
    raise ArtifactError(f"{place.requested} is a mount point and holds {strangers[0]}: {way_out}")


def put_back(place: Destination) -> None:
    """Moves files back into the staging directory, where a killed run had moved them to a mount point."""
    for name in _moved(place):
        os.rename(place.path / name, place.aside / name)


def _moved(place: Destination) -> list[str]:
    """Names of the files that a killed run had moved to a mount point. A run moves its list of files last."""
    if not place.mounted or not is_marked(place.aside) or not (place.aside / SEAL).is_file():
        return []
    listed = sealed(place.aside)
    moved = [
        name for name in sorted(tops(listed)) if Path(name).name == name and not os.path.lexists(place.aside / name)
    ]
    strange = {entry.relative_to(place.path).parts[0] for entry in strangers_in(place.path, listed)}
    return [name for name in moved if os.path.lexists(place.path / name) and name not in strange]


def existing_parent(path: Path) -> Path:
    """The innermost parent of `path` that exists."""
    return next(parent for parent in path.parents if os.path.lexists(parent))


def is_mount(folder: Path) -> bool:
    """Whether a disk, or another directory of one, is mounted at `folder`, a path without links."""
    if os.path.ismount(folder):
        return True
    if not MOUNTS.exists():
        return False
    wanted = os.fsencode(folder)
    lines = MOUNTS.read_bytes().splitlines()
    points = (line.split()[4] for line in lines)
    return any((b"\\" in point and _plain(point) == wanted) or point == wanted for point in points)


def _plain(point: bytes) -> bytes:
    """A mount point as its path, with the octal escapes of the system's list decoded."""
    for letter in b" \t\n\\":
        point = point.replace(b"\\%03o" % letter, bytes([letter]))
    return point


def _check_name(requested: Path) -> None:
    try:
        parts = [os.fsencode(part) for part in requested.absolute().parts]
    except (UnicodeEncodeError, OSError) as error:
        raise ArtifactError(f"{str(requested)!r} is no name for a directory ({error}): choose another name") from None
    if b"\0" in os.fsencode(requested):
        raise ArtifactError(f"{str(requested)!r} has a NUL in it: choose another name")
    long = max(parts, key=len)
    if len(long) > NAME_BYTES:
        raise ArtifactError(
            f"a name in {_short(requested)} is {len(long)} bytes long, of at most {NAME_BYTES}: shorten it"
        )
    if sum(len(part) + 1 for part in parts) + RESERVED > PATH_BYTES:
        raise ArtifactError(
            f"{_short(requested)} is {len(os.fsencode(requested))} bytes long, which is too much: shorten it"
        )


def _short(requested: Path) -> str:
    text = str(requested)
    return text if len(text) < 100 else f"{text[:48]}...{text[-48:]}"


def _check_parents(place: Destination) -> None:
    home = place.path if place.mounted else existing_parent(place.path)
    _check_writable(home, place.requested)
    try:
        most = os.pathconf(home, "PC_NAME_MAX")
    except (OSError, ValueError):
        most = NAME_BYTES
    if len(os.fsencode(place.aside.name)) > most:
        raise ArtifactError(
            f"the name {_short(Path(place.path.name))} is {len(os.fsencode(place.path.name))} bytes long, and qkit writes to "
            f"{_short(Path(place.aside.name))} first, which is more than {most}: shorten it"
        )


def _check_writable(home: Path, out: Path) -> None:
    if not home.is_dir():
        raise ArtifactError(f"{home} is a file, and {out} would be inside it: choose another name")
    if not os.access(home, os.W_OK | os.X_OK):
        fixed = os.statvfs(home).f_flag & os.ST_RDONLY
        why = "is on a read-only disk" if fixed else "may not be written by this user"
        raise PlanError(f"{home} {why}, and {out} would go there: choose another place")


def _check_near(place: Destination) -> None:
    placing = is_placing(check_journal(place.journal))
    check_own(place.aside, placing=placing)
    check_own(place.previous, placing=placing)


def is_placing(journal: list[str]) -> bool:
    """Whether a journal says that a finished directory was about to take its place."""
    return any(line.startswith(f'["{PLACING}"') for line in journal)
