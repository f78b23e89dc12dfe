"""Model directories as a report finds them: opened on an engine whatever their layout, and read with the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import artifact
from qkit.artifact.tensors import read_folder
from qkit.backend import Backend
from qkit.errors import BackendError, QkitError
from qkit.interop import snapshot, transfer
from qkit.training.tokens import tokens_of


def open_model(engine: Backend, directory: Path) -> Any:
    """The model in `directory` on `engine`: a float one, qkit's own, or another tool's in a layout that `qkit import` reads.

    Raises:
        ArtifactError: it is unsound, or quantized in a way that qkit holds no codes of.
        BackendError: the engine has no language models, or cannot build this one.
    """
    if not hasattr(engine, "logits"):
        raise BackendError(f"backend {engine.name!r} works on arrays only: choose one that runs language models")
    found = snapshot.read(directory)
    _, metadata = read_folder(directory)
    if not found.foreign and snapshot.layout_of(metadata) == "compressed-tensors":
        return artifact.load(directory, backend=engine)
    with TemporaryDirectory() as place:
        own = Path(place) / "artifact"
        transfer.to_artifact(found, own)
        return artifact.load(own, backend=engine)


def read_alike(directories: Sequence[Path], files: Sequence[Path]) -> NDArray[np.int32]:
    """The tokens [n] of `files`, which are the same for the model in each of `directories`.

    Raises:
        QkitError: they are not, so that losses per token cannot be compared; or see `tokens_of`.
    """
    first, *others = directories
    tokens = tokens_of(first, files)
    for other in others:
        if not np.array_equal(tokens_of(other, files), tokens):
            raise QkitError(f"{other} reads the text as other tokens than {first}: losses per token cannot be compared")
    return tokens
