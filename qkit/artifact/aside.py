"""All-or-nothing output folders."""

import os
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType

from qkit.errors import ArtifactError


class Aside:
    """A folder beside the wanted one, which takes its place when the block ends well and vanishes when it does not.

    Raises:
        ArtifactError: the wanted folder is a file, or holds anything but files whose names match `ours`.
    """

    def __init__(self, folder: Path, *, ours: Collection[str]) -> None:
        self.folder = folder.absolute()
        if not self.folder.name:
            raise ArtifactError(f"{folder} is no name for an artifact: choose a folder of its own")
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file: choose another name")
        strange = [entry.name for entry in folder.iterdir() if not _is_ours(entry, ours)] if folder.exists() else []
        if strange:
            raise ArtifactError(f"{folder} holds {sorted(strange)[0]}, which save did not write: choose another folder")
        self.aside = self.folder.with_name(f".{self.folder.name}.writing-{os.getpid()}")

    def __enter__(self) -> Path:
        self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        from shutil import rmtree  # here, so that `import qkit` stays cheap

        if kind is not None:
            rmtree(self.aside, ignore_errors=True)
            return
        old = self.folder.with_name(f".{self.folder.name}.old-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(old)
        self.aside.rename(self.folder)
        rmtree(old, ignore_errors=True)


def _is_ours(entry: Path, ours: Collection[str]) -> bool:
    return entry.is_file() and any(fnmatchcase(entry.name, pattern) for pattern in ours)
