"""Text as a model's own tokens, the same on every engine: by its `tokenizer.json`, or bytes where the vocabulary is 256."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import BackendError, QkitError

BYTES = 256  #: a vocabulary of so many, without a tokenizer, is the bytes


def tokens_of(directory: Path, files: Sequence[Path]) -> NDArray[np.int32]:
    """The tokens [n] of `files`, one after another and without special ones, as the model in `directory` reads them.

    Raises:
        QkitError: a file is missing, empty or no UTF-8, the tokenizer is not known, or the model's vocabulary lacks a token.
        BackendError: the directory has a tokenizer.json, and tokenizers is not installed.
    """
    vocabulary = vocabulary_of(directory)
    tokenizer = directory / "tokenizer.json"
    if tokenizer.exists():
        parts = _encoded(tokenizer, files)
    elif vocabulary == BYTES:
        parts = [np.frombuffer(_content(file), np.uint8).astype(np.int32) for file in files]
    else:
        raise QkitError(
            f"{directory} has no tokenizer.json, and a vocabulary of {vocabulary or 'unknown size'}: put the tokenizer of the "
            f"model there (without one, tokens are bytes, and the vocabulary {BYTES})"
        )
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    if not tokens.size:
        raise QkitError(f"there are no tokens in {', '.join(map(str, files)) or 'no files'}: give a text")
    if vocabulary and int(tokens.max()) >= vocabulary:
        raise QkitError(
            f"{directory}: the text has token {int(tokens.max())}, and the model a vocabulary of {vocabulary}: the tokenizer "
            "is another model's"
        )
    return tokens


def vocabulary_of(directory: Path) -> int | None:
    """How many tokens the model in `directory` knows, by its config.json; None where that does not say.

    Raises:
        QkitError: there is no readable config.json.
    """
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError) as error:
        raise QkitError(f"{directory} is no model with a config.json: {error}") from None
    return size if isinstance(size, int) else None


def _encoded(tokenizer: Path, files: Sequence[Path]) -> list[NDArray[np.int32]]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BackendError(f"reading {tokenizer} needs tokenizers: pip install 'qkit[hf]'") from None
    try:
        known = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain Exception
        raise QkitError(f"{tokenizer} is no tokenizer that tokenizers reads: {error}") from None
    return [np.array(known.encode(_text(file), add_special_tokens=False).ids, np.int32) for file in files]


def _text(file: Path) -> str:
    try:
        return _content(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise QkitError(f"{file} is no UTF-8 text at byte {error.start}: convert it") from None


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise QkitError(f"{file} cannot be read: {error.strerror}") from None
    if not content:
        raise QkitError(f"{file} is empty: give a file with text in it")
    return content
