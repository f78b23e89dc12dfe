"""A directory of statistics: second moments of the inputs of each layer, one file for each block, and their origin."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.fitting.identity import identity
from qkit.intake import parse_json
from qkit.storage.read import MissingError, Stored, inside, read_file

NOTE = "statistics.json"
VERSION = 1
AIM = ".aim"  #: ends the name of a weight to fit in place of a layer's own
HEAD = ".correction"  #: ends the name of the correction of an output head that stays in float
LEARNED = ".learned."  #: between the path of a layer and the name of a part of its learned codes


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics in `folder`, without the moments themselves.

    Attributes:
        folder: the directory.
        digest: SHA-256 of its note, which has the digest of each file of moments.
        model: `identity` of the float model.
        about: the note: `data` (a digest), `tokens`, `length`, `windows`, `engine`, `files`, `rows` (`coupled`, with a corrected
            drift), and `layers` by path. Of a layer: `like`, the layer with the moments of both; `file`; `tokens`; `activation`,
            the grid that inputs were rounded to; and with a corrected drift `grid`, that of the weight, and `peak`, for `nvfp4`.
            A layer has `module`, its path in the model, where that in the files is another. Experts that too few tokens reached
            have `few` and nothing else to know. A corrected output head has `head`.
    """

    folder: Path
    digest: str
    model: str
    about: Mapping[str, Any]

    @property
    def paths(self) -> frozenset[str]:
        """The layers with statistics."""
        return frozenset(path for path in self.about["layers"] if self.has(path))

    def named(self, path: str) -> str:
        """The path in the model's files of the layer at `path`, there or in the model that was calibrated."""
        layers = self.about["layers"]
        return path if path in layers else next((key for key, one in layers.items() if one.get("module") == path), path)

    def has(self, path: str) -> bool:
        """Whether there are statistics of the layer at `path`."""
        layer = self.about["layers"].get(self.named(path))
        return layer is not None and not layer.get("few") and not layer.get("head")

    @property
    def heads(self) -> list[str]:
        """The output heads that stay in float and are corrected."""
        return [path for path, layer in self.about["layers"].items() if layer.get("head")]

    @property
    def few(self) -> dict[str, int]:
        """The experts without statistics, since fewer tokens than they have inputs reached them, with the numbers of tokens."""
        return {path: int(layer["tokens"]) for path, layer in self.about["layers"].items() if layer.get("few")}

    def moments(self, path: str) -> NDArray[np.float32]:
        """E[x x'] [n, n] of the inputs of the layer at `path`, mapped read-only; layers with the same inputs share one file.

        Raises:
            ArtifactError: there is no such layer, or its file is unsound.
        """
        if not self.has(path):
            raise ArtifactError(f"{self.folder} has no statistics of {path}: fit it by search")
        return self._matrix(path, self.like(path))

    def aim(self, path: str) -> NDArray[np.float32] | None:
        """The weight [outputs, inputs] to fit in place of that of the layer at `path`, mapped read-only; None: its own.

        Raises:
            ArtifactError: its file is unsound.
        """
        return None if self.grid(path) is None else self._matrix(path, self.named(path) + AIM)

    def correction(self, path: str) -> NDArray[np.float32]:
        """M [n, n], by which the float weight W of the output head at `path` becomes W + W M, mapped read-only.

        Raises:
            ArtifactError: its file is unsound.
        """
        return self._matrix(path, self.named(path) + HEAD)

    def _matrix(self, path: str, name: str) -> NDArray[np.float32]:
        file = self.about["layers"][self.named(path)]["file"]
        found = _tensors(inside(self.folder, file)).get(name)
        if found is None or found.slot.dtype != "F32" or len(found.slot.shape) != 2:
            raise ArtifactError(f"{self.folder / file} has no matrix {name}: calibrate again")
        return found.mapped()

    def codes(self, path: str) -> dict[str, NDArray[Any]] | None:
        """The learned parts of the layer at `path` by name, as of a `QTensor`, mapped read-only; None: nothing is learned.

        Raises:
            ArtifactError: its file is unsound.
        """
        if not self.learned(path):
            return None
        file = self.about["layers"][self.named(path)]["file"]
        mine, prefix = _tensors(inside(self.folder, file)), self.named(path) + LEARNED
        found = {name.removeprefix(prefix): one.mapped() for name, one in mine.items() if name.startswith(prefix)}
        if not {"codes", "scales"} <= found.keys():
            raise ArtifactError(f"{self.folder / file} has no codes of {path}: calibrate again")
        return found

    def learned(self, path: str) -> bool:
        """Whether the rounding of the layer at `path` is learned."""
        return bool(self.about["layers"][self.named(path)].get("rounding") == "learned")

    def like(self, path: str) -> str:
        """The layer whose moments are those of `path`."""
        return str(self.about["layers"][self.named(path)]["like"])

    def activation(self, path: str) -> str | None:
        """The grid that the inputs were rounded to, as text."""
        grid = self.about["layers"][self.named(path)]["activation"]
        return None if grid is None else str(grid)

    def grid(self, path: str) -> str | None:
        """The grid that the layer at `path` was corrected for, as text; None: drift is not corrected."""
        grid = self.about["layers"][self.named(path)].get("grid")
        return None if grid is None else str(grid)

    def peak(self, path: str) -> float | None:
        """The largest magnitude of the aims that share the tensor scale of the layer at `path`, under `nvfp4`."""
        peak = self.about["layers"][self.named(path)].get("peak")
        return None if peak is None else float(peak)

    @property
    def lesson(self) -> dict[str, Any] | None:
        """How the rounding of layers was learned: steps, batch and seed; None: it was not."""
        found = self.about.get("lesson")
        return dict(found) if isinstance(found, dict) else None

    @property
    def corrected(self) -> bool:
        """Whether drift is corrected."""
        return any(self.grid(path) is not None for path in self.about["layers"])

    def check_model(self, tensors: Mapping[str, Stored], folder: Path) -> None:
        """Checks that the statistics are those of the model in `folder`, with these tensors.

        Raises:
            ArtifactError: they are of another model.
        """
        if identity(tensors) != self.model:
            raise ArtifactError(
                f"{self.folder} has statistics of another model than {folder}: run qkit calibrate {folder} for its own"
            )


def open_statistics(folder: str | Path) -> Statistics:
    """The statistics in `folder`, whose files are compared with their digests.

    Raises:
        ArtifactError: the note is unsound, or a file is not the one that it names.
        MissingError: the folder or a file is missing.
    """
    folder = Path(folder)
    note = folder / NOTE
    if not note.is_file():
        raise MissingError(f"{folder} has no {NOTE}: name a directory that qkit calibrate has written")
    data = note.read_bytes()
    try:
        about = dict(parse_json(data.decode("utf-8")))
        if about["version"] != VERSION:
            raise ArtifactError(f"{note} is of version {about['version']}; this qkit reads {VERSION}: calibrate again")
        for name, layer in about["layers"].items():
            if not {"like", "file", "tokens", "activation"} <= layer.keys() or layer["file"] not in about["files"]:
                raise ValueError(f"{name} is not described")
        files = dict(about["files"])
        found = Statistics(folder, hashlib.sha256(data).hexdigest(), str(about["model"]), about)
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{note} is not readable ({error}): calibrate again") from None
    for name, digest in files.items():
        file = inside(folder, name)
        if not file.is_file():
            raise MissingError(f"{file} is missing: calibrate again")
        if file_digest(file) != digest:
            raise ArtifactError(f"{file} is not the file that qkit calibrate wrote: calibrate again")
    return found


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_note(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the note of a directory of statistics at once, the same bytes for the same content."""
    text = json.dumps({"version": VERSION, **about}, sort_keys=True, indent=1)
    aside = folder / f"{NOTE}.new"
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(folder / NOTE)


@lru_cache(maxsize=64)
def _tensors(file: Path) -> dict[str, Stored]:
    return read_file(file)[0]
