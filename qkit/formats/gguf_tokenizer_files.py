"""The tokenizer in a GGUF file as Hugging Face's files: the inverse of `gguf_tokenizer`. Plain values only.

Read off llama.cpp 0.5 (`llama-vocab.cpp`) and tokenizers 0.22 (`tokenizer.json`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.gguf_pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qkit.formats.gguf_special import MORE_ENDS, NAMES, TEMPLATE
from qkit.formats.gguf_splits import GPT2, PATTERNS, SINGLE_DIGITS

KEY: Final = "tokenizer.ggml."
SPELLED: Final = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  #: GGUF's names of special tokens
PADDING: Final = re.compile(r"\[PAD\d+\]")  #: placeholders for rows of the embedding without a token
SPACE: Final = "▁"
LINES: Final = "gemma4"  #: merges without splits, whose letters are those of SentencePiece
#: By llama.cpp's name: the pattern that splits text, and whether whole words skip the merges.
SPLITS: Final = {name: key for key, name in PATTERNS.items()}
#: Other names that llama.cpp has for the same splits.
SAME: Final = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "qwen3": "qwen2",
    "gpt2": GPT2,
}
BEGINS: Final = ("llama-bpe", "tekken")  #: splits whose texts begin with `bos` where the file does not say


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of a Hugging Face directory with the tokenizer of the GGUF keys `fields`, by name. Empty where there is none.

    Raises:
        ArtifactError: the keys describe a tokenizer that qkit does not rebuild, or contradict each other.
    """
    model = fields.get(f"{KEY}model")
    if model in (None, "none", "no_vocab"):
        return {}
    if model not in ("llama", "gpt2"):
        raise ArtifactError(f"its tokenizer is a {model!r}, and qkit rebuilds those named 'llama' and 'gpt2'")
    try:
        table = _by_pieces(fields) if model == "llama" else _by_bytes(fields)
        files = {"tokenizer.json": table, "tokenizer_config.json": _settings(fields)}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"its tokenizer is not sound ({type(error).__name__}: {error})") from None
    ends = [fields[f"{KEY}{name}_token_id"] for name in ("eos", *MORE_ENDS) if f"{KEY}{name}_token_id" in fields]
    if len(ends) > 1:
        files["generation_config.json"] = {"eos_token_id": ends}
    found = {name: (json.dumps(one, ensure_ascii=False, indent=1) + "\n").encode() for name, one in files.items()}
    template = fields.get("tokenizer.chat_template")
    return {**found, TEMPLATE: template.encode()} if isinstance(template, str) else found


def _by_bytes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of merges of bytes, or, in the splits `LINES`, of letters."""
    pre = str(fields.get(f"{KEY}pre", "default"))
    pre = SAME.get(pre, pre)
    merges = [pair.split(" ", 1) for pair in fields[f"{KEY}merges"] if pair]
    if pre == LINES:
        return _table(fields, merges, _letters(prefix=False), pre)
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre not in SPLITS}
    if pre in SPLITS:
        first = [{"type": "Split", "pattern": {"Regex": SPLITS[pre][0]}, "behavior": "Isolated", "invert": False}]
    elif pre in (GPT2, SINGLE_DIGITS):
        first = [{"type": "Digits", "individual_digits": True}] if pre == SINGLE_DIGITS else []
    else:
        known = ", ".join(sorted({*SPLITS, *SAME, GPT2, SINGLE_DIGITS, LINES}))
        raise ArtifactError(f"its tokenizer splits text as {pre!r}, and qkit knows the splits {known}")
    steps = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, last]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    return _table(fields, merges, steps, pre)


def _by_pieces(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of SentencePiece's pieces: the higher the score of a piece, the earlier are the merges into it."""
    texts, kinds, scores = fields[f"{KEY}tokens"], fields[f"{KEY}token_type"], fields[f"{KEY}scores"]
    plain = {text: i for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind == NORMAL}
    pairs = [
        (-scores[i], i, plain[text[:at]], plain[text[at:]], text[:at], text[at:])
        for text, i in plain.items()
        for at in range(1, len(text))
        if text[:at] in plain and text[at:] in plain
    ]
    merges = [[left, right] for *_, left, right in sorted(pairs)]
    prefix = bool(fields.get(f"{KEY}add_space_prefix", True))
    return _table(fields, merges, _letters(prefix=prefix), "default")


def _letters(*, prefix: bool) -> dict[str, Any]:
    """The steps before and after merges of SentencePiece's letters; `prefix`: a space is put before a text."""
    writes = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    reads = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strips = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, writes]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [reads, {"type": "ByteFallback"}, {"type": "Fuse"}, *strips]},
    }


def _table(
    fields: Mapping[str, Any], merges: Sequence[Sequence[str]], steps: Mapping[str, Any], pre: str
) -> dict[str, Any]:
    texts, kinds = fields[f"{KEY}tokens"], fields[f"{KEY}token_type"]
    pieces = [
        (i, text, kind)
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if not (kind == UNUSED and PADDING.fullmatch(text))
    ]
    falls_back = any(kind == BYTE for *_, kind in pieces)
    unknown = next((text for _, text, kind in pieces if kind == UNKNOWN), None)
    vocabulary = {text: i for i, text, _ in pieces}
    if len(vocabulary) < len(pieces):
        raise ValueError("two tokens have one text")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown if falls_back else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": falls_back,
        "byte_fallback": falls_back,
        "ignore_merges": pre in SPLITS and SPLITS[pre][1],
        "vocab": vocabulary,
        "merges": [list(pair) for pair in merges],
    }
    added = [_added(*piece) for piece in pieces if piece[2] in (CONTROL, USER_DEFINED, UNKNOWN)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **steps,
        "post_processor": _edges(fields, pre),
        "model": model,
    }


def _added(i: int, text: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": kind != USER_DEFINED}


def _adds(fields: Mapping[str, Any], name: str, pre: str) -> bool:
    """Whether a text begins with `bos`, or ends with `eos`; llama.cpp's choice where the file does not say."""
    default = name == "bos" and (fields[f"{KEY}model"] == "llama" or pre in BEGINS)
    return bool(fields.get(f"{KEY}add_{name}_token", default)) and f"{KEY}{name}_token_id" in fields


def _edges(fields: Mapping[str, Any], pre: str) -> dict[str, Any] | None:
    """The step that puts special tokens around a text."""
    ids = {name: fields[f"{KEY}{name}_token_id"] for name in ("bos", "eos") if _adds(fields, name, pre)}
    texts = {name: fields[f"{KEY}tokens"][i] for name, i in ids.items()}
    special = {name: {"SpecialToken": {"id": text, "type_id": 0}} for name, text in texts.items()}

    def around(letter: str) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": letter, "type_id": int(letter == "B")}}
        return [one for one in (special.get("bos"), inner, special.get("eos")) if one is not None]

    if not ids:
        return None
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": [*around("A"), *around("B")],
        "special_tokens": {texts[name]: {"id": texts[name], "ids": [i], "tokens": [texts[name]]} for name, i in ids.items()},
    }  # fmt: skip


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    tokens = fields[f"{KEY}tokens"]
    keys = {name: f"{KEY}{SPELLED.get(name, name)}_token_id" for name in NAMES}
    named = {f"{name}_token": tokens[fields[key]] for name, key in keys.items() if key in fields}
    length = fields.get(f"{fields.get('general.architecture')}.context_length")
    more = {"model_max_length": length} if isinstance(length, int) else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named, **more}
