"""Where an output goes: the real place behind every link, and all that can be refused before any work is done."""

import os
from dataclasses import dataclass
from pathlib import Path

from qkit.errors import ArtifactError, PlanError
from qkit.storage.marks import PLACING, SEAL, check_journal, check_own, check_replaceable, is_marked, sealed

NAME_BYTES, PATH_BYTES = 255, 4095  #: the most that a name and a path may have, where the system does not say
ROOM = len(".model-00001-of-00001.safetensors.index.json.writing")  #: bytes that paths inside need beyond the output's
FRESH = frozenset(("lost+found",))  #: what a new volume holds by itself
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Destination:
    """The place of an output.

    Attributes:
        given: the path that was asked for, for messages.
        path: the real one, absolute and without links.
        mounted: whether `path` is a mount point. No rename can replace one, so that files are staged inside it.
    """

    given: Path
    path: Path
    mounted: bool

    @property
    def aside(self) -> Path:
        """The directory that is written first."""
        return self._near("writing")

    @property
    def journal(self) -> Path:
        """The file that is locked, and that says how far a run came."""
        return self._near("journal")

    @property
    def previous(self) -> Path:
        """The name of the old directory for a moment, on file systems that cannot exchange two."""
        return self._near("old")

    def _near(self, ending: str) -> Path:
        if self.mounted:
            return self.path / f".qkit.{ending}"
        return self.path.with_name(f".{self.path.name}.{ending}")


def destination(out: str | Path) -> Destination:
    """The place that `out` means. Looks at links and mounts only, and checks names.

    Raises:
        ArtifactError: `out` is no name for a file or directory, one too long, or a link that leads nowhere.
    """
    given = Path(out)
    _check_name(given)
    whole = given.absolute()
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
        raise ArtifactError(f"{given} is no name for a directory: choose one of its own")
    return Destination(given, path, is_mount(path))


def check_directory(out: str | Path) -> Destination:
    """The place of a directory that is to be written whole, after every check that needs no work.

    Raises:
        ArtifactError: see `destination`; `out` is a file, is inside one, holds what qkit did not write, or is a mount point
            with a model in it; or a name beside it that qkit would use belongs to something else.
        PlanError: the disk is read-only, or may not be written.
    """
    place = destination(out)
    check_place(place)
    return place


def check_place(place: Destination) -> None:
    """`check_directory` of a place that is known already."""
    _check_parents(place)
    _check_near(place)
    check_content(place)


def check_file(out: str | Path) -> Destination:
    """As `check_directory`, for a file that is not there yet.

    Raises:
        ArtifactError: `out` exists; or see `check_directory`.
        PlanError: see `check_directory`.
    """
    place = destination(out)
    if os.path.lexists(place.path):
        raise ArtifactError(f"{out} exists: remove it, or choose another name")
    return check_replaced_file(out)


def check_replaced_file(out: str | Path) -> Destination:
    """As `check_file`, for a file that may be there.

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
    """Refuses to put `file` where it cannot be, as far as that can be told before.

    Raises:
        ArtifactError: a parent is a file.
        PlanError: the disk is read-only, or may not be written.
    """
    _check_writable(nearest(file), file)


def check_content(place: Destination) -> None:
    """Refuses to replace what qkit did not write; run again when the new content is ready.

    Raises:
        ArtifactError: see `check_directory`.
    """
    if not place.mounted:
        try:
            check_replaceable(place.path)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(place.path), str(place.given), 1)) from None
        return
    moved = set(_moved(place))
    ours = {place.aside.name, place.journal.name, *moved, *FRESH}
    strangers = sorted(entry.name for entry in os.scandir(place.path) if entry.name not in ours)
    if not strangers:
        return
    way_out = f"choose a directory inside it, such as {place.given / 'model'}"
    if (place.path / SEAL).is_file() and {*strangers} <= {*sealed(place.path), SEAL}:
        raise ArtifactError(
            f"{place.given} is a mount point and holds a model, which cannot be replaced in one step: remove that, or {way_out}"
        )
    raise ArtifactError(f"{place.given} is a mount point and holds {strangers[0]}: {way_out}")


def put_back(place: Destination) -> None:
    """Puts files of a run that was killed while it moved them to a mount point back to where they are staged."""
    for name in _moved(place):
        os.rename(place.path / name, place.aside / name)


def _moved(place: Destination) -> list[str]:
    """Names of the files that a run which was killed had moved to a mount point; its list is moved last."""
    if not place.mounted or not is_marked(place.aside) or not (place.aside / SEAL).is_file():
        return []
    names = [name for name in sealed(place.aside) if Path(name).name == name]
    return [name for name in names if (place.path / name).is_file() and not os.path.lexists(place.aside / name)]


def nearest(path: Path) -> Path:
    """The nearest parent of `path` that is there."""
    return next(parent for parent in path.parents if os.path.lexists(parent))


def is_mount(folder: Path) -> bool:
    """Whether another disk, or another place of the same one, is mounted at `folder`; no link is in its path."""
    if os.path.ismount(folder):
        return True
    if not MOUNTS.exists():
        return False
    wanted = os.fsencode(folder)
    lines = MOUNTS.read_bytes().splitlines()
    points = (line.split()[4] for line in lines)
    return any((b"\\" in point and _plain(point) == wanted) or point == wanted for point in points)


def _plain(point: bytes) -> bytes:
    """A mount point with the octal escapes of the system's list undone."""
    for letter in b" \t\n\\":
        point = point.replace(b"\\%03o" % letter, bytes([letter]))
    return point


def _check_name(given: Path) -> None:
    try:
        parts = [os.fsencode(part) for part in given.absolute().parts]
    except (UnicodeEncodeError, OSError) as error:
        raise ArtifactError(f"{str(given)!r} is no name for a directory ({error}): choose another name") from None
    if b"\0" in os.fsencode(given):
        raise ArtifactError(f"{str(given)!r} has a NUL in it: choose another name")
    long = max(parts, key=len)
    if len(long) > NAME_BYTES:
        raise ArtifactError(f"a name in {_short(given)} is {len(long)} bytes long, of at most {NAME_BYTES}: shorten it")
    if sum(len(part) + 1 for part in parts) + ROOM > PATH_BYTES:
        raise ArtifactError(f"{_short(given)} is {len(os.fsencode(given))} bytes long, which is too much: shorten it")


def _short(given: Path) -> str:
    text = str(given)
    return text if len(text) < 100 else f"{text[:48]}...{text[-48:]}"


def _check_parents(place: Destination) -> None:
    home = place.path if place.mounted else nearest(place.path)
    _check_writable(home, place.given)
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
    """Whether a journal's lines say that a finished directory was about to take its place."""
    return any(line.startswith(f'["{PLACING}"') for line in journal)
