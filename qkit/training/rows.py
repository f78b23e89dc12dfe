"""Files of rows: JSON and JSON Lines; and tables and hub layouts on disk, which the library datasets reads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from qkit.errors import BackendError, RunError
from qkit.installation import TUNING, how_to_install
from qkit.intake import parse_json
from qkit.training.tokenizer import MISSING

RECORDS: Final = (".jsonl", ".json", ".ndjson")
TABLES: Final = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  #: by suffix, the reader in datasets
FOREIGN: Final = (".tsv", ".feather", ".gz", ".zst", ".zip")  #: refused by name
SAVED: Final = ("state.json", "dataset_dict.json")  #: of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`
SPLITS: Final = {
    "train": ("train",),
    "held_out": ("validation", "test", "train"),
}  #: by purpose, in order of preference

#: Reads a table, or a folder in one of the layouts of the hub, and writes its rows as JSON Lines.
SCRIPT: Final = f"""
import json, os, sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
try:
    import datasets
except ImportError:
    sys.exit({MISSING})
path, kind, *splits = sys.argv[1:]
try:
    if kind == "saved":
        found = datasets.load_from_disk(path)
        found = found if isinstance(found, dict) else {{splits[0]: found}}
    elif kind == "folder":
        found = datasets.load_dataset(path, streaming=True)
    else:
        found = {{splits[0]: datasets.load_dataset(kind, data_files=path, split="train", streaming=True)}}
    chosen = next((split for split in splits if split in found), None)
    if chosen is None:
        raise ValueError(f"it has no split {{splits[0]}}, but {{', '.join(found)}}")
    for row in found[chosen]:
        print(json.dumps({{key: value for key, value in row.items() if value is not None}}, default=str))
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}".replace(chr(10), " "))
sys.stdout.flush()
os._exit(0)  # the library's threads, which still read ahead, can abort Python's own end
"""

Row = dict[str, Any]


def is_dataset(folder: Path) -> bool:
    """Whether `folder` has a dataset: files of rows, in a layout of the hub or of `save_to_disk`."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    return any(file.suffix.lower() in (*RECORDS, *TABLES) for file in folder.rglob("*") if file.is_file())


def has_rows(path: Path) -> bool:
    """Whether `path`, a file or a folder, has rows and not plain text, by its name.

    Raises:
        RunError: it is a table or an archive, which qkit does not read.
    """
    if path.suffix.lower() in FOREIGN and path.is_file():
        raise RunError(
            f"data: {path} is no text: write its rows as Parquet or JSON Lines, with text, messages with roles, or prompts and "
            "completions"
        )
    return path.is_dir() or path.suffix.lower() in (*RECORDS, *TABLES)


def read_rows(path: Path, *, purpose: str = "train") -> list[Row]:
    """The rows of a file or of a folder. Of a folder with splits, those of the split for `purpose`: `train` or `held_out`.

    Raises:
        RunError: it is not JSON Lines, or datasets does not open it, or it has no rows.
        BackendError: it is a table or a folder, and datasets is missing.
    """
    if not path.is_dir() and path.suffix.lower() in RECORDS:
        return _json_rows(path)
    rows = _tabled_rows(path, purpose)
    if not rows:
        raise RunError(f"data: {path} has no rows: leave it out, or fill it")
    return rows


def _json_rows(file: Path) -> list[Row]:
    content = decoded(file, file.read_bytes())
    try:
        if file.suffix.lower() == ".json" and content.lstrip()[:1] == "[":
            rows = parse_json(content)
        else:
            rows = [parse_json(line) for line in content.splitlines() if line.strip()]
    except ValueError as error:
        raise RunError(
            f"data: {file} is not JSON Lines ({error}): write one object a line; to train on the JSON itself, call it .txt"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise RunError(
            f"data: {file} has no rows, or rows that are no objects: write one object a line; to train on the JSON itself, call "
            "it .txt"
        )
    found: list[Row] = rows
    return found


def _tabled_rows(path: Path, purpose: str) -> list[Row]:
    """Reads in a process of its own: a stranger's table can end a reader, and datasets brings frameworks into the process."""
    saved = any((path / name).is_file() for name in SAVED)
    kind = ("saved" if saved else "folder") if path.is_dir() else TABLES[path.suffix.lower()]
    command = [sys.executable, "-P", "-c", SCRIPT, str(path.absolute()), kind, *SPLITS[purpose]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == MISSING:
        raise BackendError(f"{path} needs datasets: {how_to_install(TUNING)}")
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(
            f"data: {path}: datasets does not open it ({words[-1]:.300}): fetch it again, or give JSON Lines"
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def decoded(file: Path, data: bytes) -> str:
    """The text of a file, with its own ends of lines.

    Raises:
        RunError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"data: {file} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None
