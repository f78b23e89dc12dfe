"""Which files and directories qkit wrote: a mark while they are written, a list in the finished ones. Nothing else is removed."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from qkit.errors import ArtifactError

SEAL = "qkit.json"  #: in a finished directory: what was written, with a digest for every tensor
MARK = ".made-by-qkit"  #: in a directory that qkit works in
MARK_TEXT = "qkit made this directory, and removes it.\n"
JOURNAL_START = '["fingerprint", "'  #: what a journal of qkit's begins with
PLACING = "placing"  #: the journal's word for a directory that is complete and about to take its place


def mark(folder: Path) -> None:
    """Marks `folder` as qkit's own. The name alone is the mark, so that no kill leaves half of one."""
    descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(descriptor, MARK_TEXT.encode(), 0)
    finally:
        os.close(descriptor)


def is_marked(folder: Path) -> bool:
    """Whether qkit made `folder`, a directory that it works in."""
    return (folder / MARK).is_file() and not (folder / MARK).is_symlink()


def sealed(folder: Path) -> Collection[str]:
    """Names of the files that qkit wrote into `folder`.

    Raises:
        ArtifactError: qkit wrote none, or its list is not readable.
    """
    try:
        return [str(name) for name in json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]]
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds a model that qkit did not write: choose another folder") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / SEAL}: not what qkit writes ({error!r}): choose another folder") from None


def check_replaceable(folder: Path) -> None:
    """Refuses to replace what qkit did not write.

    Raises:
        ArtifactError: `folder` is a file, or holds anything that is not on the list that qkit wrote into it.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file: choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    for entry in sorted(folder.iterdir()):
        if not entry.is_file() or entry.name not in {*sealed(folder), SEAL}:
            raise ArtifactError(f"{folder} holds {entry.name}, which save did not write: choose another folder")


def check_own(folder: Path, *, placing: bool = False, folders: bool = False) -> None:
    """Refuses a directory that qkit works in, unless it is absent, empty or qkit's own.

    Args:
        placing: whether the journal says that a finished directory was taking its place; only then is a seal a mark.
        folders: whether qkit puts directories into it.

    Raises:
        ArtifactError: it is a link, a file, or anything else that qkit did not make.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(_in_the_way(folder, "is a link" if folder.is_symlink() else "is a file"))
    entries = sorted(folder.iterdir())
    if not entries:
        return
    if is_marked(folder):
        strangers = [entry for entry in entries if not folders and entry.is_dir() and not entry.is_symlink()]
    elif placing and (folder / SEAL).is_file():
        try:
            known = {*sealed(folder), SEAL}
        except ArtifactError:
            known = set()
        strangers = [entry for entry in entries if entry.name not in known or not entry.is_file()]
    else:
        strangers = entries
    if strangers:
        raise ArtifactError(_in_the_way(folder, f"holds {strangers[0].name}"))


def check_journal(journal: Path) -> list[str]:
    """The lines of `journal`, none where it is not there.

    Raises:
        ArtifactError: qkit did not write it.
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
    """Removes a directory that `check_own` let pass, its mark and its list last: killed in between, it is still known.

    What is no file in it is left, and the directory with it.

    Raises:
        OSError: the system does not let it go.
    """
    names = [entry.name for entry in os.scandir(folder) if not entry.is_dir(follow_symlinks=False)]
    keep_known = () if is_marked(folder) else _listed(folder)
    for name in sorted(names, key=lambda name: (name == MARK, name == SEAL)):
        if not keep_known or name in keep_known:
            os.unlink(folder / name)
    os.rmdir(folder)


def _listed(folder: Path) -> Collection[str]:
    """The files of a finished directory that are qkit's; anything that has come between them since is not."""
    try:
        return {*sealed(folder), SEAL}
    except ArtifactError:
        return {SEAL}


def _in_the_way(path: Path, how: str) -> str:
    return (
        f"{path} {how}, and qkit, which would use that name, did not make it: move it away or remove it, "
        "or choose another name for the output"
    )
