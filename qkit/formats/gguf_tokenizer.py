"""The tokenizer of a Hugging Face directory for GGUF. Read off llama.cpp 0.5 (`llama-vocab.cpp`, `conversion/base.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qkit.errors import ArtifactError, BackendError
from qkit.formats.gguf_pieces import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    merged_pieces,
    sentence_pieces,
)
from qkit.formats.gguf_special import chat_templates, special_ids
from qkit.formats.gguf_splits import MARKS, split_of
from qkit.installation import how_to_install
from qkit.storage.read import inside, read_json

TOKENIZER: Final = "tokenizer.json"
SPM_MODEL: Final = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer for GGUF.

    Attributes:
        model: llama.cpp's algorithm: `gpt2` for byte-level merges, `llama` for SentencePiece.
        split: its name for the splits before the merges.
        pieces: the tokens by id.
        merges: pairs of tokens, the first merged first; empty for `llama`, whose scores say the order.
        ids: special ids by GGUF's name: `bos`, `eos`, `eot` ...
        adds: whether `bos` and `eos` are put around a text, and `space_prefix` before it.
        templates: chat templates by name; the usual one is `default`.
        notes: where llama.cpp differs from transformers, for the reader.
    """

    model: str
    split: str
    pieces: tuple[Piece, ...]
    merges: tuple[str, ...]
    ids: Mapping[str, int]
    adds: Mapping[str, bool]
    templates: Mapping[str, str]
    notes: tuple[str, ...]


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of the model in `folder`.

    Raises:
        ArtifactError: there is no tokenizer, or llama.cpp cannot have it; the message says why.
        BackendError: the tokenizers package is not installed.
    """
    try:
        made = _read(folder, config)
        "".join([*(piece.text for piece in made.pieces), *made.merges, *made.templates.values()]).encode()
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}, or write the file --without-tokenizer") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(
            f"{folder}: its tokenizer is not sound ({type(error).__name__}: {error}): fetch it again, or write the file "
            "--without-tokenizer"
        ) from None
    return made


def _read(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    table, settings = _table(folder, TOKENIZER), _table(folder, "tokenizer_config.json") or {}
    if table is not None:
        made = _from_json(table, settings, folder)
    elif (folder / SPM_MODEL).exists():
        made = _from_sentencepiece(folder, settings)
    else:
        raise ArtifactError(
            "no tokenizer.json and no tokenizer.model, without which llama.cpp takes no text: copy those of the original "
            "model there"
        )
    pieces = _padded(made.pieces, config.get("vocab_size"))
    ids, notes = special_ids(pieces, [config, _table(folder, "generation_config.json") or {}], settings)
    for name in ("bos", "eos"):
        if made.adds[name] and name not in ids:
            raise ArtifactError(
                f"the tokenizer puts {name} around a text, and its settings have no {name}_token: add it"
            )
    templates, lacking = chat_templates(folder, settings)
    return replace(made, pieces=pieces, ids=ids, templates=templates, notes=(*made.notes, *notes, *lacking))


def _table(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name`; None where there is none. Long numbers are floats: transformers writes 10^30."""
    if not (folder / name).exists():
        return None
    return read_json(inside(folder, name), parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))


def _from_json(table: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Vocabulary:
    model, added = table["model"], table.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise ArtifactError(f"its tokenizer is a {model['type']!r}, and llama.cpp has BPE here: use another program")
    encode, edges = _encoder(folder), {}
    edges["bos"], edges["eos"] = _edges(encode, settings)
    steps, normal = _flat(table.get("pre_tokenizer"), "pretokenizers"), _flat(table.get("normalizer"), "normalizers")
    if not model.get("byte_fallback"):
        notes = _check_normal(normal)
        split = split_of(steps, bool(model.get("ignore_merges")), lambda text: encode(text, True))
        pieces = _with_added({i: Piece(t, 0.0, NORMAL) for t, i in model["vocab"].items()}, added)
        merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        if split in MARKS:
            notes += (
                "llama.cpp splits words at combining marks, such as a separate accent, and transformers does not",
            )
        return Vocabulary("gpt2", split, pieces, merges or ("",), {}, edges, {}, (*notes, *_stripping(added)))
    prefix, notes = _space_prefix(normal, steps), _stripping(added)
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    apart = {token["content"] for token in added}
    ordered = merged_pieces(model["vocab"], pairs, apart=apart, unknown=model.get("unk_token"))
    if ordered is not None:
        if prefix and any(step["type"] == "Metaspace" for step in steps):
            notes += (
                "llama.cpp puts a space before texts that begin with one and after special tokens, transformers not",
            )
        edges["space_prefix"] = prefix
        return Vocabulary("llama", "default", _with_added(ordered, added), (), {}, edges, {}, notes)
    if not edges["bos"] or any(_crosses_lines(left + right) for left, right in pairs):
        raise ArtifactError(
            "its merges are not those of SentencePiece, and other merges llama.cpp carries out within lines only, and always "
            "with bos: train the tokenizer by SentencePiece"
        )
    if prefix:
        notes += (
            "llama.cpp puts no space before a text, as transformers does: begin a text without a chat by a space",
        )
    plain = {i: Piece(t, 0.0, BYTE if t in BYTES else NORMAL) for t, i in model["vocab"].items()}
    merges = tuple(" ".join(pair) for pair in pairs)
    return Vocabulary("gpt2", "gemma4", _with_added(plain, added), merges or ("",), {}, edges, {}, notes)


def _from_sentencepiece(folder: Path, settings: Mapping[str, Any]) -> Vocabulary:
    pieces, prefix = sentence_pieces(inside(folder, SPM_MODEL))
    added = [{**token, "id": int(i)} for i, token in (settings.get("added_tokens_decoder") or {}).items()]
    edges = {"bos": settings.get("add_bos_token", True), "eos": settings.get("add_eos_token", False)}
    edges["space_prefix"] = settings.get("add_prefix_space", prefix)
    return Vocabulary("llama", "default", _with_added(pieces, added), (), {}, edges, {}, _stripping(added))


def _encoder(folder: Path) -> Any:
    """A function from a text, and whether special tokens belong to it, to ids."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise BackendError(f"tokenizers in GGUF need the tokenizers package: {how_to_install('gguf')}") from None
    try:
        made = Tokenizer.from_file(str(inside(folder, TOKENIZER)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises plain Exception, and a panic of Rust is none
        raise ValueError(str(error)) from None
    return lambda text, special: made.encode(text, add_special_tokens=special).ids


def _edges(encode: Any, settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether transformers puts a token before a text, and one after it: as its settings say, else as the file does."""
    plain, whole = encode("a", False), encode("a", True)
    begin = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    end = len(whole) - begin - len(plain)
    stated = (settings.get("add_bos_token"), settings.get("add_eos_token"))
    if max(begin, end) > 1:
        raise ArtifactError(
            f"its tokenizer puts {begin} tokens before a text and {end} after it, and llama.cpp at most one"
        )
    return tuple(one if isinstance(one, bool) else found > 0 for one, found in zip(stated, (begin, end), strict=True))  # type: ignore[return-value]


def _flat(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A step of tokenizer.json as a flat list: the steps of a sequence in their order."""
    if step is None:
        return []
    return [one for each in step[inner] for one in _flat(each, inner)] if step["type"] == "Sequence" else [step]


def _check_normal(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    kinds = {str(step["type"]) for step in steps}
    if kinds - {"NFC"}:
        raise ArtifactError(f"its tokenizer changes text by {', '.join(sorted(kinds))}, and llama.cpp does not")
    return (
        ("the tokenizer composes letters and accents (NFC), and llama.cpp does not: compose texts before",)
        if kinds
        else ()
    )


def _space_prefix(normal: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a space is put before a text.

    Raises:
        ArtifactError: the tokenizer does more to a text than to write spaces as SentencePiece does.
    """
    prefix = False
    for step in (*normal, *steps):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                prefix = scheme != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # no space is left
            case _:
                raise ArtifactError(
                    f"its tokenizer changes text by {step['type']}, and llama.cpp does not: use another program"
                )
    return prefix


def _with_added(pieces: Mapping[int, Piece], added: Sequence[Mapping[str, Any]]) -> tuple[Piece, ...]:
    """Pieces by id, with the added tokens, and placeholders for ids without a token."""
    found = dict(pieces)
    for token in added:
        text, special = token["content"], token.get("special") or _looks_special(token["content"])
        known = found.get(token["id"])
        kind = CONTROL if special else USER_DEFINED
        if known is not None and known.kind == UNKNOWN:
            kind = UNKNOWN
        found[token["id"]] = Piece(text if special else text.replace("▁", " "), -1000.0, kind)
    size = max(found, default=-1) + 1
    if min(found, default=0) < 0 or size > len(found) + 1_000_000:
        raise ValueError("ids of tokens are not a range")
    return tuple(found.get(i, Piece(f"[PAD{i}]", -10000.0, UNUSED)) for i in range(size))


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token, though its file does not say so."""
    ends = text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))
    return ends or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or (text.startswith("<unused") and text[-1] == ">")


def _crosses_lines(text: str) -> bool:
    """Whether a token has a line break beside another letter."""
    return "\n" in text and bool(text.strip("\n"))


def _stripping(added: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    names = [token["content"] for token in added if token.get("lstrip") or token.get("rstrip")]
    shown = ", ".join(names[:3])
    return (f"{shown}: the tokenizer drops spaces beside such tokens, and llama.cpp keeps them",) if names else ()


def _padded(pieces: tuple[Piece, ...], size: Any) -> tuple[Piece, ...]:
    if type(size) is not int:
        return pieces
    extra = [piece.text for piece in pieces[size:]]
    if any(piece.kind not in (UNUSED, CONTROL, USER_DEFINED) for piece in pieces[size:]):
        raise ArtifactError(
            f"the tokenizer has {len(pieces)} tokens, and the embedding {size} rows: put the tokenizer of this model "
            "there"
        )
    texts = {piece.text for piece in pieces[:size]}
    if len(texts) != len(pieces) - len(extra):
        raise ArtifactError("two tokens have one text, and llama.cpp opens no such file")
    return (*pieces[:size], *(Piece(f"[PAD{i}]", -10000.0, UNUSED) for i in range(len(pieces), size)))
