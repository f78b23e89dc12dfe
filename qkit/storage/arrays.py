"""NumPy arrays from directories of safetensors files, mapped rather than read, and arrays as streams to write."""

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from qkit.storage import read
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.write import Stream


def read_file(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of one file, mapped read-only, and the metadata of its header. Raises as `read.read_file`."""
    tensors, metadata = read.read_file(file)
    return read.map_tensors(tensors), metadata


def read_folder(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a folder, mapped read-only, and its metadata. Raises as `read.read_folder`."""
    tensors, metadata = read.read_folder(folder)
    return read.map_tensors(tensors), metadata


def array_stream(name: str, array: NDArray[Any]) -> Stream:
    """`array` as a stream that writes one tensor."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return Stream(Slot(name, TYPE_NAMES[array.dtype.name], array.shape), lambda: [data])
