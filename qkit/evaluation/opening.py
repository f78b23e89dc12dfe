"""Opens model directories in any layout that qkit reads, and reads a text as the same tokens for all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.config import read_config
from qkit.artifact.load import load
from qkit.artifact.metadata import KEY, layout_of
from qkit.engines.protocol import Builds
from qkit.errors import QkitError
from qkit.exchange.import_model import read_model
from qkit.exchange.load_any import load_any
from qkit.storage.arrays import read_folder
from qkit.training.text import Text, read_text


def open_model(engine: Builds, directory: Path) -> Any:
    """The model in `directory` on `engine`: a float one, qkit's own, or another tool's in a layout that `qkit import` reads.

    Raises:
        ArtifactError: it is damaged, or quantized in a way that qkit does not read.
        BackendError: the engine has no language models, or cannot build this one.
    """
    _, metadata = read_folder(directory)
    if KEY in metadata and layout_of(metadata) == "compressed-tensors":
        return load(directory, backend=engine)
    return load_any(read_model(directory), engine)


def read_alike(directories: Sequence[Path], patterns: Sequence[str]) -> Text:
    """The tokens of the files that match `patterns`, which are the same for the model in each of `directories`.

    Raises:
        QkitError: two models read the text as different tokens, so that their losses cannot be compared; or see `read_text`.
    """
    for directory in directories:
        read_folder(directory)  # says which command takes a directory that is no model
    first, *others = (read_text(patterns, folder=one, config=_config(one)) for one in directories)
    for directory, other in zip(directories[1:], others, strict=True):
        if not np.array_equal(first.tokens, other.tokens):
            raise QkitError(
                f"{directory} reads the text as other tokens than {directories[0]}: losses per token cannot be "
                "compared: name models with one tokenizer"
            )
    return first


def _config(directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    if config is None:
        raise QkitError(f"{directory} is no model with a config.json: name a Hugging Face directory")
    return config
