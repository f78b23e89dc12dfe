"""The measurements of a comparison on disk, so that one that failed or was interrupted goes on, and repeats none of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.config import read_config
from qkit.evaluation import Evaluation
from qkit.fitting.identity import identity
from qkit.intake import parse_json, read_text
from qkit.rules import Recipe, rule_table
from qkit.storage.read import read_folder
from qkit.storage.staging import replaced_file

FILE: Final = "measured.json"  #: in the folder of the report
MARKER: Final = "qkit_measured"  #: the first key of the file
SCHEMA: Final = 1
PARTS: Final = ("losses", "kl", "agreement")  #: of an evaluation, a number for each window
MOST: Final = 1 << 28  #: most bytes of the file


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """The measurements of one model, with the size of its tensors: stored bits per number, and bytes."""

    evaluation: Evaluation
    bits: float
    nbytes: int


class Measurements:
    """Measurements by the name of their row, each with a key: the digest of all that they follow from.

    Args:
        file: where they are written after each. None: nowhere.
        setting: of the measurements: text, engine, versions.
    """

    def __init__(self, file: Path | None, setting: Mapping[str, Any]) -> None:
        self._file, self._setting = file, dict(setting)
        self._rows: dict[str, dict[str, Any]] = _read(file) if file else {}
        self.found: dict[str, Measurement] = {}

    def key(self, origin: Path, recipe: Recipe | None) -> str:
        """The digest of a model, a directory or a checkpoint that is put on `recipe`, and of the setting."""
        table = [rule_table(rule) for rule in recipe.rules] if recipe else None
        text = json.dumps([self._setting, _identity(origin), table], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def known(self, name: str, key: str) -> Measurement | None:
        """The measurement of an earlier run under the same key."""
        row = self._rows.get(name)
        if row is None or row["key"] != key:
            return None
        losses, kl, agreement = (np.array(row[part], np.float64) for part in PARTS)
        self.found[name] = Measurement(Evaluation(losses, row["length"], kl, agreement), row["bits"], row["nbytes"])
        return self.found[name]

    def add(self, name: str, key: str, one: Measurement) -> None:
        """Takes in a measurement, and writes the file."""
        self.found[name] = one
        numbers = one.evaluation
        row: dict[str, Any] = {part: getattr(numbers, part).tolist() for part in PARTS}
        self._rows[name] = {"key": key, "length": numbers.length, "bits": one.bits, "nbytes": one.nbytes, **row}
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self._file) as aside:
                aside.write_text(json.dumps({MARKER: SCHEMA, "rows": self._rows}) + "\n", encoding="utf-8")


def setting_of(
    engine: str, device: str, floats: Path, rows: NDArray[np.int32], versions: Mapping[str, str]
) -> dict[str, Any]:
    """All that the measurements of every model follow from: the float model they are compared with, text, engine, versions."""
    text = hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
    place = {"engine": engine, "device": device, "versions": dict(versions)}
    return {**place, "teacher": _identity(floats), "text": text, "shape": list(rows.shape)}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of the file; none where there is no file, or one of another version."""
    if not file.exists():
        return {}
    try:
        table = parse_json(read_text(file, most=MOST))
        rows = dict(table["rows"]) if table[MARKER] == SCHEMA else {}
    except (ValueError, KeyError, TypeError):
        return {}
    wanted = {"key", "length", "bits", "nbytes", *PARTS}
    return {name: row for name, row in rows.items() if isinstance(row, dict) and row.keys() == wanted}


def _identity(origin: Path) -> list[Any]:
    """A model's tensors and configuration; a checkpoint's size and time."""
    if origin.is_file():
        status = origin.stat()
        return [str(origin), status.st_size, status.st_mtime_ns]
    return [identity(read_folder(origin)[0]), read_config(origin)]
