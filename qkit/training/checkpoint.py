"""Checkpoints of a training run: one safetensors file each, complete or absent. Only the last two stay."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError, DivergedError
from qkit.storage.arrays import read_file
from qkit.storage.layout import SINGLE, TYPE_NAMES, Slot, lay_out
from qkit.storage.swap import sync_folder
from qkit.storage.tensor_writer import write_all

KEY = "qkit_run"  #: the one metadata key
KEPT = 2  #: checkpoints that stay in the folder
PATTERN = "checkpoint-*.safetensors"
FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint from a file: the file, its run as plain values, and the memory-mapped state of the trainer."""

    file: Path
    about: dict[str, Any]
    state: dict[str, NDArray[Any]]

    @property
    def step(self) -> int:
        """How many steps the run had taken."""
        return int(self.state["steps"])


def write(
    folder: Path,
    state: Mapping[str, NDArray[Any]],
    *,
    about: Mapping[str, Any],
    best: Callable[..., int | None] | None = None,
) -> Path:
    """Adds the checkpoint of `state` to `folder`, syncs it to the disk, and removes all but the last two.

    Args:
        best: the step of the best evaluation up to a step, `until`. Its checkpoints stay, for each of the last two.

    Raises:
        DivergedError: a weight or a moment is not finite; nothing is written.
        OSError: the file cannot be written, as on a full disk. Earlier checkpoints are unchanged.
    """
    check_finite(state)
    file = file_of(folder, int(state["steps"]))
    aside = folder / ".checkpoint.writing"
    slots = [Slot(name, TYPE_NAMES[array.dtype.name], array.shape) for name, array in state.items()]
    whole = lay_out(slots, metadata={KEY: json.dumps(about, sort_keys=True)}, shard_bytes=1 << 62)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_all(descriptor, whole.headers[SINGLE], 0)
        for name, array in state.items():
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            write_all(descriptor, data, whole.places[name].begin)
        os.fsync(descriptor)
    except OSError as error:
        aside.unlink(missing_ok=True)  # frees the disk space
        raise OSError(error.errno, error.strerror, str(file)) from None  # with the name of the file
    finally:
        os.close(descriptor)
    os.rename(aside, file)
    sync_folder(folder)
    files = sorted(folder.glob(PATTERN))
    bests = [best(until=step_of(one)) for one in files[-KEPT:]] if best else []
    for old in files[:-KEPT]:
        if step_of(old) not in bests:
            old.unlink()
    return file


def file_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def step_of(file: Path) -> int:
    """The inverse of `file_of`."""
    return int(file.stem.removeprefix("checkpoint-"))


def newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint in `folder`, if there is one.

    Raises:
        ArtifactError: it is damaged, or not a checkpoint of qkit's. The message names it, and the one before.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        return None
    before = f"go on from {files[-2].name}, the one before" if files[1:] else "begin anew: there is none before"
    return _read(files[-1], f"remove it to {before}")


def of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint after `step` steps.

    Raises:
        ArtifactError: it is missing, damaged, or not a checkpoint of qkit's.
    """
    file = file_of(folder, step)
    if not file.exists():
        raise ArtifactError(f"{file} is missing, and has the best evaluation: remove {folder} to begin anew")
    return _read(file, f"remove {folder} to begin anew")


def _read(file: Path, way_out: str) -> Checkpoint:
    try:
        state, metadata = read_file(file)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {way_out}") from None
    try:
        about = dict(json.loads(metadata[KEY]))
        int(state["steps"])
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is no checkpoint of qkit's ({error!r}): {way_out}") from None
    return Checkpoint(file, about, state)


def check_finite(state: Mapping[str, NDArray[Any]]) -> None:
    """Raises DivergedError for the first weight or moment that is not finite. Skips static ranges, which begin as infinite."""
    for name, array in state.items():
        if array.dtype in FLOATS and not name.endswith("_range") and not np.isfinite(array).all():
            raise DivergedError(f"{name} is not finite after step {int(state['steps'])}: lower the learning rate")
