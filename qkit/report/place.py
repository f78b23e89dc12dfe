"""The folder of a report: qkit replaces files there only if their content says that qkit wrote them."""

from collections.abc import Mapping
from pathlib import Path

from qkit.errors import ArtifactError
from qkit.report.measured import FILE, MARKER
from qkit.storage.destination import check_replaced_file

HEAD = 4096  #: leading bytes of a file in which qkit looks for its own marker

PICTURE = b"Software\0qkit"
REPORT = {
    "report.html": b'<meta name="generator" content="qkit">',
    "report.json": b'"tokens_per_byte"',
    "report.png": PICTURE,
    FILE: f'"{MARKER}"'.encode(),
}


def check_report(folder: Path, files: Mapping[str, bytes] = REPORT) -> None:
    """Refuses, before any work, to replace a file of the same name that qkit did not write.

    Args:
        files: by name, the marker that qkit's own file has within its first `HEAD` bytes.

    Raises:
        ArtifactError: `folder` holds such a file, or is not a folder; see `check_replaced_file`.
        PlanError: the disk is read-only.
    """
    for name, marker in files.items():
        path = check_replaced_file(folder / name).path
        if not path.exists():
            continue
        with path.open("rb") as stream:
            if marker not in stream.read(HEAD):
                raise ArtifactError(f"{folder / name} is there, and qkit did not write it: choose another folder")
