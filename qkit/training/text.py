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
from qkit.training.records import LossOn, Passage, passages
from qkit.training.rows import decoded, has_rows, is_dataset, read_rows
from qkit.training.tokenizer import encode, encode_with_places

BYTES = range(256, 261)  #: sizes of a vocabulary of bytes, with up to four special tokens
FOREIGN = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "merges.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The tokens of files.

    Attributes:
        tokens: int32 [n].
        kind: `tokenizer.json` or `bytes`.
        name: names of the files, for messages.
        nbytes: size of the text.
        ends: where each row ends in `tokens`, ascending; a file of plain text is one row.
        learned: bool [n], the tokens that are predicted; None: all.
    """

    tokens: NDArray[np.int32]
    kind: str
    name: str
    nbytes: int
    ends: NDArray[np.int64]
    learned: NDArray[np.bool_] | None = None


def find(patterns: Sequence[str]) -> list[Path]:
    """The files that names and shell patterns stand for, each once, sorted within a pattern; and folders with a dataset.

    Raises:
        RunError: a pattern matches no file, or a file is empty.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir() and is_dataset(Path(pattern)):
            found[Path(pattern)] = None
            continue
        files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [file for file in files if Path(file).is_file()]
        if not files:
            raise RunError(f"data: {pattern!r} stands for no file: give a path, or a pattern in quotes")
        found.update(dict.fromkeys(map(Path, files)))
    for file in found:
        if file.is_file() and not file.stat().st_size:
            raise RunError(f"data: {file} is empty: leave it out, or fill it")
    return list(found)


def read_text(
    patterns: Sequence[str],
    *,
    folder: Path,
    config: Mapping[str, Any],
    loss_on: LossOn | None = "all",
    chat: bool = False,
    purpose: str = "train",
) -> Text:
    """The tokens of files, one after another, for the model in `folder`. Of files of rows, see `records`, those of their texts.

    Args:
        config: of the model. Every token has to be below its `vocab_size`.
        loss_on, chat: see `passages`.
        purpose: see `read_rows`.

    Raises:
        RunError: see `find`; or qkit does not know the model's tokenizer, or it belongs to another model; or a file is not UTF-8;
            or see `read_rows` and `passages`; or a row has no token to learn.
        BackendError: a library that the files need is not installed.
    """
    files, vocabulary = find(patterns), vocabulary_of(folder, config)
    name = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    content = [one for file in files for one in _contents(file, folder, loss_on=loss_on, chat=chat, purpose=purpose)]
    rows, learned, kind = tokenize(content, folder=folder, vocabulary=vocabulary)
    tokens = np.concatenate(rows)
    largest = int(tokens.max(initial=-1))
    if largest >= vocabulary:
        raise RunError(
            f"{folder}: the text has token {largest}, and the model a vocabulary of {vocabulary}: put the "
            "tokenizer of this model there"
        )
    if largest < 0:
        raise RunError(f"there are no tokens in {name}: give more text")
    nbytes = sum(len(one if isinstance(one, bytes) else one.text.encode("utf-8")) for _, one in content)
    return Text(tokens, kind, name, nbytes, np.cumsum([row.size for row in rows]), learned)


def vocabulary_of(folder: Path, config: Mapping[str, Any]) -> int:
    """How many tokens the model in `folder` knows, by its `config`.

    Raises:
        RunError: `config` does not say.
    """
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise RunError(f"{folder / 'config.json'} has no vocab_size: want a language model")
    return size


Content = tuple[Path, bytes | Passage]


def _contents(path: Path, folder: Path, *, loss_on: LossOn | None, chat: bool, purpose: str) -> list[Content]:
    """The bytes of a file of text, or the passages of rows, each with its file."""
    if has_rows(path):
        rows = read_rows(path, purpose=purpose)
        return [(path, one) for one in passages(path, rows, folder=folder, loss_on=loss_on, chat=chat)]
    if loss_on == "completions":
        raise RunError(f"data: {path} is text without completions: leave loss_on = 'completions' out, or give rows")
    return [(path, path.read_bytes())]


def tokenize(
    content: list[Content], *, folder: Path, vocabulary: int
) -> tuple[list[NDArray[np.int32]], NDArray[np.bool_] | None, str]:
    """The tokens of each content; the mask of those that are learned, one content after the other; and their kind.

    Raises:
        RunError, BackendError: see `read_text`.
    """
    tokenizer, kind = inside(folder, "tokenizer.json"), "bytes"
    masked = any(isinstance(one, Passage) and one.learned is not None for _, one in content)
    if tokenizer.exists():
        kind = tokenizer.name
    else:
        _check_bytes(folder, vocabulary)
        if not masked:
            raw = [one if isinstance(one, bytes) else one.text.encode("utf-8") for _, one in content]
            return [np.frombuffer(one, np.uint8).astype(np.int32) for one in raw], None, kind
    texts = [one.text if isinstance(one, Passage) else decoded(file, one) for file, one in content]
    if not masked:
        return encode(texts, tokenizer), None, kind
    pairs = encode_with_places(texts, tokenizer) if kind != "bytes" else [_bytes_with_places(text) for text in texts]
    masks = [_mask(one, places) for (_, one), (_, places) in zip(content, pairs, strict=True)]
    return [tokens for tokens, _ in pairs], np.concatenate(masks), kind


def _mask(content: bytes | Passage, places: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which tokens, by the places where they begin, are predicted.

    Raises:
        RunError: none is.
    """
    if isinstance(content, bytes) or content.learned is None:
        return np.ones(places.shape, np.bool_)
    mask = np.zeros(places.shape, np.bool_)
    for begin, end in content.learned:
        mask |= (begin <= places) & (places < end)
    if not mask.any():
        raise RunError(
            f"data: {content.name} has no token in its completion, so that there is nothing to learn: leave it out, or fill it"
        )
    return mask


def _bytes_with_places(text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The bytes of a text as tokens, and the place of the character that each is part of."""
    sizes = [len(character.encode("utf-8")) for character in text]
    tokens = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
    return tokens, np.repeat(np.arange(len(text), dtype=np.int32), sizes)


def _check_bytes(folder: Path, vocabulary: int) -> None:
    """Refuses a model without tokenizer.json whose tokens are not bytes."""
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
