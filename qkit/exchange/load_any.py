"""A model on an engine from a directory in any layout that qkit reads."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qkit.artifact.load import load
from qkit.artifact.snapshot import Snapshot
from qkit.engines.protocol import Builds
from qkit.exchange.import_model import to_artifact


def load_any(source: Snapshot, engine: Builds) -> Any:
    """The model of `source` on `engine`. One of another layout becomes an artifact first, in a directory of its own.

    Raises:
        ArtifactError: a weight is not sound, or quantizes more than itself; or see `load`.
        BackendError: the engine has no language models, or cannot build this one.
    """
    if not source.foreign and source.layout != "mlx":
        return load(source.folder, backend=engine)
    with TemporaryDirectory() as place:
        own = Path(place) / "artifact"
        to_artifact(source, own)
        return load(own, backend=engine)
