"""Numbers that train beside the factors of adapters, in files of their own: mlx-lm refuses tensors that it does not know.

Gains of scales by the path of their layer, and norms by the names of tensors. Files are untrusted.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError, QkitError
from qkit.reference.merged import Update
from qkit.storage.read import inside, read_file

GAINS, NORMS = "qkit_gains.safetensors", "qkit_norms.safetensors"
KEY = "qkit.norms"  #: beside the paths of layers in the note of the factors' file: the names of the norms that trained


def noted(norms: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The entry of the note that says which norms belong to the factors."""
    return {KEY: {"names": sorted(norms)}} if norms else {}


def files(updates: Mapping[str, Update], norms: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """The contents of the files by name: those of the gains of `updates` and of `norms`, where there are some."""
    from safetensors.numpy import save

    gains = {path: update.gains for path, update in updates.items() if update.gains is not None}
    floats = {name: np.ascontiguousarray(norm, np.float32) for name, norm in norms.items()}
    return {name: save(arrays) for name, arrays in ((GAINS, gains), (NORMS, floats)) if arrays}


def with_gains(folder: Path, path: str, update: Update, noted: Mapping[str, Any]) -> Update:
    """`update` with its gains, if the note says that it has some."""
    if not noted.get(path, {}).get("gains"):
        return update
    file = folder / GAINS
    stored = read_file(inside(folder, GAINS))[0] if file.exists() else {}
    if path not in stored:
        raise ArtifactError(f"{file} lacks the gains of {path}, which it was trained with: fetch it again")
    try:
        return replace(update, gains=stored[path].mapped().astype(np.float32))
    except QkitError as error:
        raise ArtifactError(f"{file}: {path}: {error}") from None


def norms(folder: Path, noted: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The norms in `folder` that belong to the factors with this note.

    Raises:
        ArtifactError: one is missing or not finite, or the note does not name them.
    """
    file, names = folder / NORMS, noted.get(KEY, {}).get("names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{folder}: the note of its norms has {names!r}: want a list of names")
    stored = read_file(inside(folder, NORMS))[0] if names and file.exists() else {}
    found = {}
    for name in names:
        if name not in stored:
            raise ArtifactError(f"{file} lacks the norm {name}, which it was trained with: fetch it again")
        found[name] = stored[name].mapped().astype(np.float32)
        if not np.isfinite(found[name]).all():
            raise ArtifactError(f"{file}: {name} holds a NaN or an infinity: fetch it again")
    return found
