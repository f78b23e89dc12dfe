"""Float models whose arrays are read from their files when something is computed with them, and let go of after each block."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from qkit_mlx.models import surgery

FILES = "qkit_files"  #: the attribute of a model that holds its `Files`


class Files:
    """The tensors of a model, of which `mx.load` reads none before it is needed.

    Args:
        tensors: maps of safetensors files, by the names there.
        copied: an array of a tensor that is no such map.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], copied: Callable[[NDArray[Any]], mx.array]) -> None:
        self._tensors, self._copied = tensors, copied

    def arrays(self) -> dict[str, mx.array]:
        """New arrays of all tensors."""
        opened: dict[str, Any] = {}
        found: dict[str, mx.array] = {}
        for name, tensor in self._tensors.items():
            file = _file_of(tensor)
            if file is not None and file not in opened:
                opened[file] = mx.load(file)
            array: mx.array | None = opened[file].get(name) if file is not None else None
            same = array is not None and array.shape == tensor.shape and _named(array) == tensor.dtype.name
            found[name] = array if array is not None and same else self._copied(tensor)
        return found


def fill(model: nn.Module, files: Files) -> None:
    """As `surgery.fill` of all tensors; the model has `files` from then on.

    Raises:
        ArtifactError: as that.
    """
    surgery.fill(model, files.arrays())
    object.__setattr__(model, FILES, files)  # Module's own would take it for a parameter


def forget(model: nn.Module, path: str) -> None:
    """Gives the module at `path` arrays that are not read yet, where the model has files; nothing else refers to the old ones."""
    files: Files | None = getattr(model, FILES, None)
    if files is not None:
        surgery.fill(model, files.arrays(), within=f"{path}.")


def _file_of(tensor: NDArray[Any]) -> str | None:
    """The safetensors file that `tensor` is a map of."""
    base: Any = tensor
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    name = str(base.filename) if base is not None else ""
    return name if name.endswith(".safetensors") else None


def _named(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]
