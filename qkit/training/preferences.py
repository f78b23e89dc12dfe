"""The rows of a method: tokens with masks for `sft`; a prompt with a chosen and a rejected answer for `dpo` and `orpo`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import RunError
from qkit.training.records import messages_of, passages
from qkit.training.rows import Row, has_rows, read_rows
from qkit.training.run import Run
from qkit.training.text import find, read_text, tokenize, vocabulary_of

ANSWERS = ("chosen", "rejected")


def tuning_rows(run: Run, config: Mapping[str, Any], *, purpose: str = "train") -> list[Mapping[str, Any]]:
    """The rows of `run.data`, in the form of `TuneOptions.rows`; of folders with splits those of the split for `purpose`.

    Raises:
        RunError: a row does not fit the method, has nothing to learn, or has no room for it within `run.length`.
        BackendError: see `read_text`.
    """
    if run.method == "sft":
        return _tokens(run, config, purpose)
    found: list[Mapping[str, Any]] = []
    for path in find(run.data):
        if not has_rows(path):
            raise RunError(
                f"data: {path} is text, and method {run.method!r} wants rows with prompt, chosen and rejected"
            )
        rows = [
            _preference(path, number, row, chat=run.chat)
            for number, row in enumerate(read_rows(path, purpose=purpose), start=1)
        ]
        found += _with_tokens(run, path, rows, vocabulary_of(run.model, config))
    return found


def _tokens(run: Run, config: Mapping[str, Any], purpose: str) -> list[Mapping[str, Any]]:
    how: dict[str, Any] = {"loss_on": run.loss_on, "chat": run.chat, "purpose": purpose}
    text = read_text(run.data, folder=run.model, config=config, **how)
    learned = np.ones(text.tokens.shape, np.bool_) if text.learned is None else text.learned
    rows: list[Mapping[str, Any]] = []
    for number, (ids, mask) in enumerate(
        zip(np.split(text.tokens, text.ends[:-1]), np.split(learned, text.ends[:-1]), strict=True), start=1
    ):
        if not mask[1 : run.length].any():
            raise RunError(
                f"row {number} of {text.name} has no token to learn within length {run.length}: lengthen it, or leave it out"
            )
        rows.append({"input_ids": ids.tolist(), "completion_mask": mask.astype(int).tolist()})
    return rows


def _preference(path: Path, number: int, row: Row, *, chat: bool) -> Row:
    """A row as texts, or as lists of messages, in `prompt`, `chosen` and `rejected`."""
    name = f"row {number} of {path}"
    for key in ANSWERS:
        if not row.get(key):
            raise RunError(
                f"data: {name} has {'an empty' if key in row else 'no'} {key!r}: give prompt, chosen and rejected"
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise RunError(
            f"data: {name} has no 'prompt', and its answers do not begin alike: give prompt, chosen and rejected"
        )
    if chat or any(isinstance(one, list) for one in (prompt, chosen, rejected)):
        prompt, chosen, rejected = (
            [{"role": role, "content": one}] if isinstance(one, str) else messages_of(name, one)
            for role, one in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
        )
    if chosen == rejected:
        raise RunError(f"data: {name} has the same text in chosen and in rejected: leave it out")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _with_tokens(run: Run, path: Path, rows: list[Row], vocabulary: int) -> list[Mapping[str, Any]]:
    """Each row with the tokens of its prompt and of its answers. Of both answers, the prompt has the same tokens."""
    both = []
    for answer in ANSWERS:
        pairs = [{"prompt": row["prompt"], "completion": row[answer]} for row in rows]
        made = passages(path, pairs, folder=run.model, loss_on="completions", chat=False)
        found, learned, _ = tokenize([(path, one) for one in made], folder=run.model, vocabulary=vocabulary)
        assert learned is not None
        masks = np.split(learned, np.cumsum([ids.size for ids in found])[:-1])
        both.append([(ids.tolist(), int(mask.argmax())) for ids, mask in zip(found, masks, strict=True)])
    out: list[Mapping[str, Any]] = []
    for number, (row, (chosen, begin), (rejected, other)) in enumerate(zip(rows, *both, strict=True), start=1):
        if max(begin, other) >= run.length:
            raise RunError(
                f"data: row {number} of {path} has {max(begin, other)} tokens before its answers, and length is {run.length}: "
                "make length longer, or leave it out"
            )
        ids = {"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[other:]}
        out.append({**row, **ids})
    return out
