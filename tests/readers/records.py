"""The rows of results.json: the answer of a reader, and its inputs. `run` writes them; the table reads them.

A row has no cell of the table: `verdict` computes it from the answer. So a mended rule judges the answers that are there anew.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from recipes import MODELS, READERS, RECIPES, SAID, Reader, refusal, tried, within

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
DIGITS = 16  #: of a digest
Key = tuple[str, str, str]  #: model, recipe, reader
Row = dict[str, Any]


def all_keys() -> Iterator[Key]:
    """All rows of the table."""
    for model in MODELS:
        for recipe in RECIPES:
            for reader, about in READERS.items():
                if recipe in about.recipes and tried(model, recipe):
                    yield model, recipe, reader


def load() -> dict[Key, Row]:
    """The rows that were run, by model, recipe and reader."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return {(row["model"], row["recipe"], row["reader"]): row for row in rows}


def write(rows: dict[Key, Row]) -> None:
    """Writes the rows in the order of the table, a line each."""
    lines = [json.dumps(rows[key]) for key in all_keys() if key in rows]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def verdict(row: Row) -> str:
    """The cell: the difference from the law, the reason for a known refusal, or WRONG and why."""
    recipe, reader = row["recipe"], row["reader"]
    reason = refusal(row["model"], recipe, reader)
    if "error" in row:
        known = reason and any(words in row["error"] for words in SAID[reason])
        return f"refused: {reason}" if known else f"WRONG: {row['error']}"
    if reason:
        return f"WRONG: opens, {row['far']:.0e} from the law, although it was said to refuse: {reason}"
    equal = row["far"] <= within(recipe, reader) and row["text"]
    return f"{row['far']:.0e}" if equal else f"WRONG: {row['far']:.1e} from the law, {row['text']!r}"


def sealed(row: Row) -> Row:
    """The row with a digest of all that it says, so that one that is changed by hand is found."""
    bare = {name: value for name, value in row.items() if name != "seal"}
    return bare | {"seal": _digest(json.dumps(bare, sort_keys=True).encode())}


def digest_of(folder: Path) -> str:
    """Digest of the names and bytes of a file, or of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def script(reader: Reader) -> str:
    """Digest of the scripts that open a directory in `reader`, and of its options; comments and docstrings do not count."""
    names = ["asked.py", reader.script]
    names += ["llama_server.py"] if reader.environment == "llama.cpp" else []
    names += ["vllm_reference.py"] if reader.options.get("reference") else []
    return _digest(*(_code(HERE / name) for name in names), json.dumps(reader.options).encode())


@cache
def code() -> str:
    """Digest of the sources of qkit and its engines, which wrote the directories and the law."""
    return _digest(*(_code(file) for room in ("qkit", "backends") for file in sorted((ROOT / room).rglob("*.py"))))


def _code(file: Path) -> bytes:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            del node.body[0]
    return ast.dump(tree).encode()


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:DIGITS]
