"""Where a report goes: files of qkit's own, told by what is in them, and no others."""

from collections.abc import Mapping
from pathlib import Path

from qkit.errors import ArtifactError
from qkit.storage.destination import check_replaced_file

SOFTWARE = {"Software": "qkit"}  #: what pictures say of themselves
HEAD = 4096  #: bytes in which a file says that it is qkit's

PICTURE = b"Software\0qkit"
REPORT = {
    "report.html": b'<meta name="generator" content="qkit">',
    "report.json": b'"tokens_per_byte"',
    "report.png": PICTURE,
}


def check_report(folder: Path, files: Mapping[str, bytes] = REPORT) -> None:
    """Refuses, before any work, to replace a file of the same name that qkit did not write.

    Args:
        files: by name, words that those of qkit's have near their beginning.

    Raises:
        ArtifactError: `folder` holds such a file, or is none; see `check_directory`.
        PlanError: the disk is read-only.
    """
    for name, words in files.items():
        path = check_replaced_file(folder / name).path
        if not path.exists():
            continue
        with path.open("rb") as stream:
            if words not in stream.read(HEAD):
                raise ArtifactError(f"{folder / name} is there, and qkit did not write it: choose another folder")
