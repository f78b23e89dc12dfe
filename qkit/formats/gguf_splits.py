"""How a byte-pair tokenizer splits text before it merges, and llama.cpp's name for that. Plain values only.

Read off llama.cpp 0.5 (`llama-vocab.cpp`) and transformers 5.23 (`models/*/tokenization_*.py`).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.gguf_hashes import HASHES, TEXT

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: llama.cpp's name, by the pattern of a `Split` before `ByteLevel`, and by whether whole words skip the merges.
PATTERNS: Final = {
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}", False): "smaug-bpe",
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}", False): "qwen2",
    (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ): "qwen35",
    (rf"{_CASED % ((_CONTRACTIONS + '?',) * 2)}|\p{{N}}{{1,3}}|{_CASED_TAIL}", False): "gpt-4o",
    (rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_TAIL}", True): "tekken",
}
#: Of these, llama.cpp's pattern differs from the model's: combining marks are no letters to it.
MARKS: Final = {"gpt-4o", "llama4", "tekken", "pixtral"}
SINGLE_DIGITS: Final = "smollm"  #: GPT-2's pattern, after each digit became a word of its own
GPT2: Final = "gpt-2"


def split_of(steps: Sequence[Mapping[str, Any]], whole_words: bool, encode: Callable[[str], list[int]]) -> str:
    """llama.cpp's name for the splits of a byte-pair tokenizer: by its tokens of one text, else by its steps.

    Args:
        steps: `pre_tokenizer` of tokenizer.json, as a flat list.
        whole_words: `ignore_merges` of its model.
        encode: returns the ids of a text, with special tokens.

    Raises:
        ArtifactError: llama.cpp has no such splits; the message names those that it has.
    """
    digest = hashlib.sha256(str(encode(TEXT)).encode()).hexdigest()
    found = HASHES.get(digest) or _by_steps(steps, whole_words)
    if found is None:
        known = ", ".join(sorted({*HASHES.values(), *PATTERNS.values()}))
        kinds = " and ".join(str(step.get("type")) for step in steps) or "no splits"
        raise ArtifactError(
            f"llama.cpp does not know how its tokenizer splits text ({kinds}; the hash of llama.cpp's text is {digest[:12]}): "
            f"it knows those of {known}"
        )
    return found


def _by_steps(steps: Sequence[Mapping[str, Any]], whole_words: bool) -> str | None:
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    plain = steps[-1].get("use_regex", True) and not whole_words
    match steps[:-1]:
        case []:
            return GPT2 if plain else None
        case [{"type": "Digits", "individual_digits": True}]:
            return SINGLE_DIGITS if plain else None
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as step]:
            alone = not steps[-1].get("use_regex", True) and not step.get("invert")
            return PATTERNS.get((pattern, whole_words)) if alone else None
    return None
