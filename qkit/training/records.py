"""Files of records, JSON and JSON Lines: rows of text, and conversations by the model's own chat template."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from qkit.errors import BackendError, RunError
from qkit.installation import how_to_install
from qkit.intake import parse_json
from qkit.training.tokenizer import MISSING, RATE, SECONDS

RECORDS: Final = (".jsonl", ".json", ".ndjson")
TABLES: Final = (".parquet", ".arrow", ".csv", ".tsv", ".feather", ".gz", ".zst", ".zip")  #: refused by name
CHAT: Final = ("messages", "conversations", "conversation")
OTHERS: Final = {
    "prompt": "prompts and completions",
    "chosen": "preferences",
    "instruction": "instructions",
}  #: by a key of a row, the kind of its file

#: Reads a list of conversations and writes a list of texts; the error of a template goes to standard error.
SCRIPT: Final = f"""
import json, os, sys

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from transformers import AutoTokenizer
except ImportError:
    sys.exit({MISSING})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
texts = []
for number, messages in enumerate(json.load(sys.stdin), start=1):
    try:
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        sys.exit(f"conversation {{number}}: {{error}}".replace(chr(10), " "))
json.dump(texts, sys.stdout)
"""


def is_records(file: Path) -> bool:
    """Whether `file` has rows, by its name.

    Raises:
        RunError: it is a table or an archive, which qkit does not read.
    """
    if file.suffix.lower() in TABLES:
        raise RunError(
            f"data: {file} is no text: write its rows as JSON Lines, with a key text, or messages with roles"
        )
    return file.suffix.lower() in RECORDS


def read_records(file: Path, content: str, *, folder: Path) -> list[str]:
    """The text of each row of `file`: its key `text`, or its conversation by the chat template of the model in `folder`.

    Raises:
        RunError: the file is not made of such rows, a message has no role, or the model has no template for them.
        BackendError: transformers is missing.
    """
    rows = _rows(file, content)
    kinds = {_kind(file, number, row) for number, row in enumerate(rows, start=1)}
    if len(kinds) > 1:
        raise RunError(
            f"data: {file} has rows with {' and rows with '.join(sorted(kinds))}: put each kind into its own file"
        )
    kind = kinds.pop()
    if kind == "text":
        return [row["text"] for row in rows]
    return _render(file, [_messages(file, number, row[kind]) for number, row in enumerate(rows, start=1)], folder)


def _rows(file: Path, content: str) -> list[dict[str, Any]]:
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
    found: list[dict[str, Any]] = rows
    return found


def _kind(file: Path, number: int, row: dict[str, Any]) -> str:
    """The key of a row that has its text."""
    for key, kind in OTHERS.items():
        if key in row:
            raise RunError(
                f"data: row {number} of {file} has a {key}: qkit train does not read {kind}; give text or messages, or train "
                "with TRL and QatCallback"
            )
    for key in ("text", *CHAT):
        if key in row:
            if key == "text" and not isinstance(row[key], str):
                raise RunError(f"data: row {number} of {file}: text is {row[key]!r:.60}: want a string")
            return key
    raise RunError(f"data: row {number} of {file} has neither text nor messages: it has {', '.join(row) or 'nothing'}")


def _messages(file: Path, number: int, messages: Any) -> list[dict[str, Any]]:
    """The messages of a row, in the form of chat templates."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RunError(f"data: row {number} of {file}: want a list of messages, each with role and content")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise RunError(
                f"data: row {number} of {file} has a message without a role or without content ({', '.join(message)}): give "
                "both, as texts"
            )
    return messages


def _render(file: Path, conversations: list[list[dict[str, Any]]], folder: Path) -> list[str]:
    """The text of each conversation. A template is a stranger's program: it runs in a process of its own, with a time limit."""
    message = json.dumps(conversations)
    command = [sys.executable, "-P", "-c", SCRIPT, str(folder.absolute())]
    seconds = SECONDS + len(message) / RATE
    try:
        done = subprocess.run(
            command, input=message, capture_output=True, timeout=seconds, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"the chat template of {folder} did not end within {seconds:.0f} seconds: it may never end; fetch it again"
        ) from None
    if done.returncode == MISSING:
        raise BackendError(f"the conversations of {file} need transformers: {how_to_install('hf')}")
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(
            f"data: {file}: the tokenizer of {folder} does not write conversations ({words[-1]:.200}): put a chat_template.jinja "
            "there, or give text"
        )
    texts: list[str] = json.loads(done.stdout)
    return texts
