"""Files to token numbers, the same on every engine, by the tokenizer of a model's directory or byte by byte."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import RunError
from qkit.storage.read import inside
from qkit.training.tokenizer import encode

BYTES = range(256, 261)  #: vocabularies that are bytes, and up to four special tokens
FOREIGN = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "merges.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What files hold, as tokens int32 [n]; and by what: `tokenizer.json` or `bytes`."""

    tokens: NDArray[np.int32]
    kind: str
    name: str  #: of the files, for messages
    nbytes: int  #: of the files


def find(patterns: Sequence[str]) -> list[Path]:
    """The files that names and shell patterns stand for, each once, sorted within a pattern.

    Raises:
        RunError: one stands for none, or a file is empty.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [file for file in files if Path(file).is_file()]
        if not files:
            raise RunError(f"data: {pattern!r} stands for no file")
        found.update(dict.fromkeys(map(Path, files)))
    for file in found:
        if not file.stat().st_size:
            raise RunError(f"data: {file} is empty: leave it out, or fill it")
    return list(found)


def read_text(patterns: Sequence[str], *, folder: Path, config: Mapping[str, Any]) -> Text:
    """The tokens of files, one after another, for the model in `folder`.

    Args:
        config: of the model: its `vocab_size` has to hold every token.

    Raises:
        RunError: see `find`; or the model has no tokenizer that qkit knows, or another's, or a file is not UTF-8.
        BackendError: it has a tokenizer.json, and tokenizers is not installed.
    """
    files, vocabulary = find(patterns), vocabulary_of(folder, config)
    name = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    content = [file.read_bytes() for file in files]
    tokens, kind = _tokens(files, content, folder=folder, vocabulary=vocabulary)
    largest = int(tokens.max(initial=-1))
    if largest >= vocabulary:
        raise RunError(
            f"{folder}: the text has token {largest}, and the model a vocabulary of {vocabulary}: the tokenizer is of another"
        )
    if largest < 0:
        raise RunError(f"there are no tokens in {name}: give more text")
    return Text(tokens, kind, name, sum(map(len, content)))


def vocabulary_of(folder: Path, config: Mapping[str, Any]) -> int:
    """How many tokens the model in `folder` knows, by its `config`.

    Raises:
        RunError: it does not say.
    """
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise RunError(f"{folder / 'config.json'} has no vocab_size: want a language model")
    return size


def _tokens(files: list[Path], content: list[bytes], *, folder: Path, vocabulary: int) -> tuple[NDArray[np.int32], str]:
    """The tokens of all files, and what they are by."""
    tokenizer = inside(folder, "tokenizer.json")
    if tokenizer.exists():
        texts = [_decoded(file, data) for file, data in zip(files, content, strict=True)]
        return np.concatenate(encode(texts, tokenizer)), tokenizer.name
    strange = sorted(file.name for pattern in FOREIGN for file in folder.glob(pattern))
    if strange:
        raise RunError(
            f"{folder / strange[0]} is no tokenizer that qkit opens: let transformers save it as tokenizer.json"
        )
    if vocabulary not in BYTES:
        raise RunError(
            f"{folder} has no tokenizer.json, and a vocabulary of {vocabulary} is not one of bytes (256 to 260): put the model's "
            "tokenizer there"
        )
    return np.frombuffer(b"".join(content), np.uint8).astype(np.int32), "bytes"


def _decoded(file: Path, data: bytes) -> str:
    """The text, with the ends of lines that it has."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"data: {file} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None
