"""The special tokens and the chat templates of a tokenizer, for GGUF. Read off llama.cpp 0.5 (`llama-vocab.cpp`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qkit.formats.chat_template import unsupported
from qkit.formats.gguf_pieces import NORMAL, USER_DEFINED, Piece
from qkit.intake import read_text
from qkit.storage.read import inside

TEMPLATE: Final = "chat_template.jinja"
NAMES: Final = ("bos", "eos", "unk", "pad", "sep", "mask")
MORE_ENDS: Final = ("eot", "eom")  #: GGUF's names for two more tokens that end an answer
#: Tokens that always end an answer, whatever the file says.
ENDS: Final = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "<|end_of_text|>",
        "</s>",
    )
)


def special_ids(
    pieces: Sequence[Piece], configs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The ids of special tokens, by GGUF's names, and notes for the reader.

    Args:
        pieces: the tokens by id.
        configs: `config.json` and `generation_config.json`, the latter of which overrules the former.
        settings: `tokenizer_config.json`.
    """
    by_text = {piece.text: i for i, piece in enumerate(pieces)}
    ids: dict[str, int] = {}
    for name in NAMES:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        stated = [by_text[text]] if isinstance(text, str) and text in by_text else []
        known = [*stated, *(i for table in reversed(configs) for i in _ids(table, name) if i < len(pieces))]
        if known:
            ids[name] = known[0]
    stops = dict.fromkeys(i for table in reversed(configs) for i in _ids(table, "eos") if i < len(pieces))
    more = [i for i in stops if i != ids.get("eos") and pieces[i].text not in ENDS]
    ids.update(zip(MORE_ENDS, more, strict=False))
    notes = _taken_for_ends(pieces)
    if len(more) > len(MORE_ENDS):
        rest = ", ".join(pieces[i].text for i in more[len(MORE_ENDS) :])
        notes.append(f"llama.cpp has eos and {len(MORE_ENDS)} more tokens that end an answer, and not {rest}")
    if "eos" not in ids:
        notes.append(
            "the tokenizer has no eos, and llama.cpp then takes token 11 for it: add eos_token to tokenizer_config.json"
        )
    return ids, tuple(notes)


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The chat templates by name, the usual one as `default`, and notes for the reader.

    Args:
        settings: `tokenizer_config.json`.

    Raises:
        ArtifactError: the file of the template is no regular file of the folder.
    """
    stated = settings.get("chat_template")
    templates = {"default": stated} if isinstance(stated, str) else {}
    for one in stated if isinstance(stated, list) else ():
        templates[str(one["name"])] = str(one["template"])
    if (folder / TEMPLATE).exists():
        templates["default"] = read_text(inside(folder, TEMPLATE))
    if not templates:
        return {}, ("the tokenizer has no chat template, and llama.cpp then takes that of ChatML",)
    lacking = {name: unsupported(text) for name, text in templates.items()}
    notes = [
        f"chat template {name!r} uses {', '.join(found)}, which llama.cpp lacks"
        for name, found in lacking.items()
        if found
    ]
    return templates, tuple(notes)


def _taken_for_ends(pieces: Sequence[Piece]) -> list[str]:
    """A note on ordinary tokens that llama.cpp makes control tokens as it loads any file, such as `</s>` in Qwen 2."""
    found = sorted(piece.text for piece in pieces if piece.text in ENDS and piece.kind in (NORMAL, USER_DEFINED))
    return [
        f"{text}: llama.cpp takes these letters for one token that ends an answer, where special tokens are parsed; "
        "the tokenizer takes them for text"
        for text in found
    ]


def _ids(table: Mapping[str, Any], name: str) -> list[int]:
    value = table.get(f"{name}_token_id")
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int and one >= 0]
