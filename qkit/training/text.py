"""Token numbers of text files, by the tokenizer in a model's directory or byte by byte. They are the same on every engine."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import RunError
from qkit.storage.read import inside
from qkit.training.records import is_records, read_records
from qkit.training.tokenizer import encode

BYTES = range(256, 261)  #: sizes of a vocabulary of bytes, with up to four special tokens
FOREIGN = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "merges.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The tokens of files, int32 [n], and their kind: `tokenizer.json` or `bytes`."""

    tokens: NDArray[np.int32]
    kind: str
    name: str  #: names of the files, for messages
    nbytes: int  #: size of the text


def find(patterns: Sequence[str]) -> list[Path]:
    """The files that names and shell patterns stand for, each once, sorted within a pattern.

    Raises:
        RunError: a pattern matches no file, or a file is empty.
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
    """The tokens of files, one after another, for the model in `folder`. Of files of rows, see `records`, those of their texts.

    Args:
        config: of the model. Every token has to be below its `vocab_size`.

    Raises:
        RunError: see `find`; or qkit does not know the model's tokenizer, or it belongs to another model; or a file is not UTF-8;
            or see `read_records`.
        BackendError: the model has a tokenizer.json, and the library tokenizers is not installed.
    """
    files, vocabulary = find(patterns), vocabulary_of(folder, config)
    name = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    content = [(file, data) for file in files for data in _contents(file, folder)]
    tokens, kind = _tokens(content, folder=folder, vocabulary=vocabulary)
    largest = int(tokens.max(initial=-1))
    if largest >= vocabulary:
        raise RunError(
            f"{folder}: the text has token {largest}, and the model a vocabulary of {vocabulary}: its tokenizer is another's"
        )
    if largest < 0:
        raise RunError(f"there are no tokens in {name}: give more text")
    return Text(tokens, kind, name, sum(len(data) for _, data in content))


def vocabulary_of(folder: Path, config: Mapping[str, Any]) -> int:
    """How many tokens the model in `folder` knows, by its `config`.

    Raises:
        RunError: `config` does not say.
    """
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise RunError(f"{folder / 'config.json'} has no vocab_size: want a language model")
    return size


def _contents(file: Path, folder: Path) -> list[bytes]:
    """The bytes of a file; of a file of rows, the text of each row."""
    if not is_records(file):
        return [file.read_bytes()]
    return [row.encode("utf-8") for row in read_records(file, _decoded(file, file.read_bytes()), folder=folder)]


def _tokens(content: list[tuple[Path, bytes]], *, folder: Path, vocabulary: int) -> tuple[NDArray[np.int32], str]:
    """The tokens of all contents, each with its file, and their kind."""
    tokenizer = inside(folder, "tokenizer.json")
    if tokenizer.exists():
        texts = [_decoded(file, data) for file, data in content]
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
    return np.frombuffer(b"".join(data for _, data in content), np.uint8).astype(np.int32), "bytes"


def _decoded(file: Path, data: bytes) -> str:
    """The text of a file, with its own ends of lines."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"data: {file} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None
