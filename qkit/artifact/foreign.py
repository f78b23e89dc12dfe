"""Directories of models that other programs quantized, for everything that opens a directory: read, or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.artifact.families import EMBEDDINGS
from qkit.errors import ArtifactError
from qkit.experts import expert_of
from qkit.rules import Kind
from qkit.sources.detect import FLOAT, detect
from qkit.sources.source import Source, open_source, stored_types
from qkit.storage.read import Stored

#: Ends sentences about commands that open float models and qkit's own artifacts only.
IMPORT = "qkit import DIR OUT makes an artifact of it, with the same codes where qkit has a grid for them"


def open_any(folder: Path, stored: Mapping[str, Stored], config: Mapping[str, Any] | None) -> Source:
    """The model in `folder`, which qkit did not write: float, or quantized by any program that qkit reads.

    Args:
        stored: its tensors.
        config: content of its `config.json`.

    Raises:
        ArtifactError: see `open_source`.
    """
    return open_source(folder, stored, config, kind_of_path=kind_of_path)


def check_float(folder: Path, stored: Mapping[str, Stored], config: Mapping[str, Any] | None) -> None:
    """Checks that the model in `folder`, which qkit did not write, is a float model.

    Raises:
        ArtifactError: it is quantized, or see `detect`.
    """
    try:
        found = detect(folder, config, stored_types(stored))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    if found.method != FLOAT:
        raise ArtifactError(f"{folder} is quantized by {found.method}, not by qkit ({found.place}): {IMPORT}")


def kind_of_path(path: str) -> Kind:
    """Kind of the quantized layer at `path`, by the names of layers in transformers' models."""
    if expert_of(path):
        return "experts"
    return "embedding" if EMBEDDINGS.search(path.rpartition(".")[2]) else "linear"
