"""How qkit knows its own directories: a mark in those it works in, a list of files in finished ones. It removes no others."""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from qkit.errors import ArtifactError

SEAL = "qkit.json"  #: the seal of a finished directory: its files, and a digest of every tensor
MARK = ".made-by-qkit"  #: name of the mark in a working directory
MARK_TEXT = "qkit made this directory, and removes it.\n"
JOURNAL_START = '["fingerprint", "'  #: first bytes of every journal of qkit's
PLACING = "placing"  #: stands in the journal of a directory that is complete and about to take its place


def mark(folder: Path) -> None:
    """Marks `folder` as a working directory of qkit's. The file's name is the mark, so a kill leaves no partial mark."""
    descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(descriptor, MARK_TEXT.encode(), 0)
    finally:
        os.close(descriptor)


def is_marked(folder: Path) -> bool:
    """Whether `folder` is a working directory of qkit's."""
    return (folder / MARK).is_file() and not (folder / MARK).is_symlink()


def sealed(folder: Path) -> Collection[str]:
    """Names of the files that qkit wrote into `folder`.

    Raises:
        ArtifactError: the folder has no list of qkit's, or the list is not readable.
    """
    try:
        return [str(name) for name in json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]]
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds a model that qkit did not write: choose another folder") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SEAL}: not what qkit writes ({error!r}): choose another folder") from None


def tops(names: Iterable[str]) -> set[str]:
    """The entries of a directory that hold the files `names`, some of which lie in directories of it."""
    return {name.partition("/")[0] for name in names}


def folders_of(names: Iterable[str]) -> list[str]:
    """The directories below a directory that hold the files `names` of it, the outermost first."""
    return sorted({str(folder) for name in names for folder in list(PurePosixPath(name).parents)[:-1]})


def strangers_in(folder: Path, known: Collection[str]) -> list[Path]:
    """The entries of `folder` that are none of the files `known`, and no directory that holds some of these alone."""
    found = []
    for entry in sorted(folder.iterdir()):
        below = _below(known, entry.name)
        if below and _is_folder(entry):
            found += strangers_in(entry, below)
        elif entry.name not in known or not entry.is_file():
            found.append(entry)
    return found


def check_replaceable(folder: Path) -> None:
    """Checks that qkit wrote every entry of `folder`.

    Raises:
        ArtifactError: `folder` is a file, or has an entry that is not on qkit's list in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file: choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    for entry in strangers_in(folder, {*sealed(folder), SEAL}):
        name = entry.relative_to(folder)
        raise ArtifactError(f"{folder} holds {name}, which save did not write: choose another folder")


def check_own(folder: Path, *, placing: bool = False, folders: bool = False) -> None:
    """Checks that `folder`, which qkit would work in, is absent, empty or a working directory of qkit's.

    Args:
        placing: whether the journal says that a finished directory was taking its place. Only then a seal counts as a mark.
        folders: whether qkit itself puts directories into the folder.

    Raises:
        ArtifactError: the path is a link or a file, or qkit did not make the directory or one of its entries.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(_in_the_way(folder, "is a link" if folder.is_symlink() else "is a file"))
    entries = sorted(folder.iterdir())
    if not entries:
        return
    if is_marked(folder):
        known = _listed(folder)
        inner = [entry for entry in entries if not folders and _is_folder(entry)]
        strangers = [entry for entry in inner if not _is_own(entry, _below(known, entry.name))]
    elif placing and (folder / SEAL).is_file():
        try:
            known = {*sealed(folder), SEAL}
        except ArtifactError:
            known = set()
        strangers = strangers_in(folder, known)
    else:
        strangers = entries
    if strangers:
        raise ArtifactError(_in_the_way(folder, f"holds {strangers[0].name}"))


def check_journal(journal: Path) -> list[str]:
    """The lines of `journal`; an empty list where there is no file.

    Raises:
        ArtifactError: qkit did not write the file.
    """
    if not os.path.lexists(journal):
        return []
    if journal.is_symlink() or not journal.is_file():
        raise ArtifactError(_in_the_way(journal, "is no plain file"))
    with journal.open("rb") as stream:
        begin = stream.read(len(JOURNAL_START)).decode(errors="replace")
        if not JOURNAL_START.startswith(begin):  # shorter where a kill cut it
            raise ArtifactError(_in_the_way(journal, "is another program's"))
        return (begin + stream.read().decode(errors="replace")).splitlines()


def remove(folder: Path) -> None:
    """Removes a directory that `check_own` has passed: its files first, then its mark and its list, then itself.

    A kill in between leaves a directory that qkit still recognizes. Of directories inside, only those of companions are removed.

    Raises:
        OSError: the system refuses to remove an entry, or a directory is inside.
    """
    marked, listed = is_marked(folder), _listed(folder)
    for inner in [entry for entry in folder.iterdir() if _is_folder(entry)]:
        below = _below(listed, inner.name)
        if marked and _is_own(inner, below):
            _empty(inner, None)
        elif not marked and below:
            _empty(inner, below)
    names = [entry.name for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
    keep_known = () if marked else listed
    for name in sorted(names, key=lambda name: (name == MARK, name == SEAL)):
        if not keep_known or name in keep_known:
            os.unlink(folder / name)
    os.rmdir(folder)


def _empty(inner: Path, listed: Collection[str] | None) -> None:
    """Removes a directory of companions: its files, or those on the list if there is one, its mark, and itself if it is empty.

    Args:
        listed: files of the directory, also of directories in it; None for a directory that `_is_own` has passed.
    """
    for name in sorted(os.listdir(inner), key=lambda name: name == MARK):
        below = None if listed is None else _below(listed, name)
        if _is_folder(inner / name):
            if below is None or below:
                _empty(inner / name, below)
        elif listed is None or name in listed:
            os.unlink(inner / name)
    if not os.listdir(inner):
        os.rmdir(inner)


def _below(names: Iterable[str], top: str) -> set[str]:
    """The files among `names` that lie in the directory `top`, by their names there."""
    return {name.removeprefix(f"{top}/") for name in names if name.startswith(f"{top}/")}


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


def _is_own(inner: Path, listed: Collection[str]) -> bool:
    """Whether qkit made the directory `inner` of a working directory: it is marked, empty, or holds nothing but listed files.

    Args:
        listed: files of `inner`. The same holds for each directory in it.
    """
    folders = [inner / name for name in os.listdir(inner) if _is_folder(inner / name)]
    if not all(_is_own(folder, _below(listed, folder.name)) for folder in folders):
        return False
    files = set(os.listdir(inner)) - {folder.name for folder in folders}
    return is_marked(inner) or files <= set(listed)


def _listed(folder: Path) -> Collection[str]:
    """The files of a finished directory that qkit wrote. Files that others added since are not among them."""
    try:
        return {*sealed(folder), SEAL}
    except ArtifactError:
        return {SEAL}


def _in_the_way(path: Path, how: str) -> str:
    return (
        f"{path} {how}, and qkit, which would use that name, did not make it: move it away or remove it, "
        "or choose another name for the output"
    )
