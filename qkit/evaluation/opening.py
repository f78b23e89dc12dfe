"""Model directories as a report finds them: opened on an engine whatever their layout, and read with the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qkit import artifact
from qkit.artifact.directory import read_config
from qkit.artifact.metadata import KEY
from qkit.engines.protocol import Builds
from qkit.errors import QkitError
from qkit.exchange import snapshot, transfer
from qkit.storage.arrays import read_folder
from qkit.training.text import Text, read_text


def open_model(engine: Builds, directory: Path) -> Any:
    """The model in `directory` on `engine`: a float one, qkit's own, or another tool's in a layout that `qkit import` reads.

    Raises:
        ArtifactError: it is unsound, or quantized in a way that qkit holds no codes of.
        BackendError: the engine has no language models, or cannot build this one.
    """
    _, metadata = read_folder(directory)
    if KEY in metadata and snapshot.layout_of(metadata) == "compressed-tensors":
        return artifact.load(directory, backend=engine)
    found = snapshot.read(directory)
    if found.layout == "float":
        return artifact.load(directory, backend=engine)
    with TemporaryDirectory() as place:
        own = Path(place) / "artifact"
        transfer.to_artifact(found, own)
        return artifact.load(own, backend=engine)


def read_alike(directories: Sequence[Path], patterns: Sequence[str]) -> Text:
    """What the files that `patterns` stand for hold, as tokens that are the same for the model in each of `directories`.

    Raises:
        QkitError: they are not, so that losses per token cannot be compared; or see `read_text`.
    """
    first, *others = (read_text(patterns, folder=one, config=_config(one)) for one in directories)
    for directory, other in zip(directories[1:], others, strict=True):
        if not np.array_equal(first.tokens, other.tokens):
            raise QkitError(
                f"{directory} reads the text as other tokens than {directories[0]}: losses per token cannot be compared"
            )
    return first


def _config(directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    if config is None:
        raise QkitError(f"{directory} is no model with a config.json: name a Hugging Face directory")
    return config
