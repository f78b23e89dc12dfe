"""Rows as passages to train on: text, conversations by the model's own chat template, and prompts with completions."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from qkit.errors import BackendError, RunError
from qkit.installation import ENGINE, how_to_install
from qkit.storage.read import inside, read_json
from qkit.training.rows import Row
from qkit.training.tokenizer import MISSING, RATE, SECONDS

CHAT: Final = ("messages", "conversations", "conversation")
LossOn = Literal["all", "completions"]
SPEAKERS: Final = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
OTHERS: Final = {
    "chosen": "preferences: train with --method dpo or orpo",
    "instruction": "instructions: name them prompt",
}

#: Reads a list of conversations. Writes the text of each, and the places of the assistant's turns from number `first` on.
SCRIPT: Final = f"""
import json, os, sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.modules["torch"] = None  # templates need none, and its import takes most of the time
try:
    from transformers import AutoTokenizer
except ImportError:
    sys.exit({MISSING})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)

def render(messages, tools, **more):
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more) if messages else ""

def place(messages, tools, whole, i):
    for more in ({{"add_generation_prompt": True}}, {{}}):
        before = render(messages[:i], tools, **more)
        end = whole if i + 1 == len(messages) else render(messages[: i + 1], tools)
        if whole.startswith(before) and whole.startswith(end) and len(before) <= len(end):
            return [len(before), len(end)]
    raise ValueError(f"message {{i + 1}} is written otherwise in the whole conversation; train on all of it")

found = []
for number, row in enumerate(json.load(sys.stdin), start=1):
    messages, tools = row["messages"], row["tools"]
    try:
        whole = render(messages, tools)
        turns = [] if row["first"] is None else range(row["first"], len(messages))
        places = [place(messages, tools, whole, i) for i in turns if messages[i]["role"] == "assistant"]
    except Exception as error:
        sys.exit(f"conversation {{number}}: {{error}}".replace(chr(10), " "))
    found.append([whole, None if row["first"] is None else places])
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to train on.

    Attributes:
        name: where it is from, for messages.
        learned: places [begin, end) in the text, in characters, whose tokens are predicted. None: all of it.
    """

    text: str
    name: str
    learned: tuple[tuple[int, int], ...] | None = None


def passages(path: Path, rows: list[Row], *, folder: Path, loss_on: LossOn | None, chat: bool) -> list[Passage]:
    """The passages of the rows of `path`, for the model in `folder`.

    Args:
        loss_on: `completions` predicts completions and the assistant's turns only. None does so for prompts with completions, as
            TRL does.
        chat: whether prompts and completions that are texts are turns of a conversation, as mlx-lm has them.

    Raises:
        RunError: the rows are of several kinds or of none, a message has no role, a completion is empty, or the model has no
            template for them.
        BackendError: transformers is missing.
    """
    kinds = {_kind(path, number, row) for number, row in enumerate(rows, start=1)}
    if len(kinds) > 1:
        raise RunError(
            f"data: {path} has rows with {' and rows with '.join(sorted(kinds))}: put each kind into its own file"
        )
    kind = kinds.pop()
    if kind == "text":
        if loss_on == "completions":
            raise RunError(f"data: {path} has rows of text without completions: leave loss_on = 'completions' out")
        end = end_of(folder)
        return [Passage(row["text"] + end, f"row {number} of {path}") for number, row in enumerate(rows, start=1)]
    masked = loss_on == "completions" or (loss_on is None and kind == "prompt")
    if kind == "prompt" and not chat and not any(isinstance(row["prompt"], list) for row in rows):
        return [_completed(path, number, row, folder, masked) for number, row in enumerate(rows, start=1)]
    conversations = [_conversation(path, number, row, kind, masked) for number, row in enumerate(rows, start=1)]
    return _rendered(path, conversations, folder)


def end_of(folder: Path) -> str:
    """The text of the model's token for the end of a text; empty if its tokenizer names none."""
    token = (read_json(inside(folder, "tokenizer_config.json"), parse_int=float) or {}).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def messages_of(name: str, messages: Any) -> list[Row]:
    """Messages in the form of chat templates, each with a role and content. Calls their row by `name`.

    Raises:
        RunError: they are no list, or one has no role or no content.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RunError(f"data: {name}: want a list of messages, each with role and content")
    found = [_named(one) for one in messages]
    for message in found:
        told = isinstance(message.get("content"), str) or message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not told:
            raise RunError(
                f"data: {name} has a message without a role or without content ({', '.join(message)}): give both, as texts"
            )
    return found


def _named(message: Row) -> Row:
    """A message of ShareGPT's form, with `from` and `value`, under the names of chat templates."""
    if "from" in message and "value" in message and "role" not in message:
        speaker = message["from"]
        return {"role": SPEAKERS.get(speaker, speaker), "content": message["value"]}
    return message


def _kind(path: Path, number: int, row: Row) -> str:
    """The key of a row that has its text, or the prompt before its completion."""
    for key, kind in OTHERS.items():
        if key in row:
            raise RunError(f"data: row {number} of {path} has a key {key!r}, for {kind}")
    if "prompt" in row:
        if "completion" not in row:
            raise RunError(f"data: row {number} of {path} has a prompt without a completion: it has {', '.join(row)}")
        return "prompt"
    for key in ("text", *CHAT):
        if key in row:
            if key == "text" and not isinstance(row[key], str):
                raise RunError(f"data: row {number} of {path}: text is {row[key]!r:.60}: want a string")
            return key
    raise RunError(
        f"data: row {number} of {path} has neither text nor messages nor a prompt: it has {', '.join(row) or 'nothing'}"
    )


def _completed(path: Path, number: int, row: Row, folder: Path, masked: bool) -> Passage:
    """A prompt and its completion, one after the other, and the end of a text."""
    name, prompt, completion = f"row {number} of {path}", row["prompt"], row["completion"]
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise RunError(f"data: {name}: {key} is {row[key]!r:.60}: want texts, or lists of messages in both")
    _want_completion(name, completion)
    whole = prompt + completion + end_of(folder)
    return Passage(whole, name, ((len(prompt), len(whole)),) if masked else None)


def _want_completion(name: str, completion: Any) -> None:
    if not completion:
        raise RunError(
            f"data: {name} has an empty completion, so that there is nothing to learn: leave it out, or fill it"
        )


def _conversation(path: Path, number: int, row: Row, kind: str, masked: bool) -> Row:
    """The messages of a row, its tools, and the number of the first message whose turn may be learned; None for all text."""
    name, first = f"row {number} of {path}", 0
    if kind == "prompt":
        _want_completion(name, row["completion"])
        prompt, completion = (
            [{"role": role, "content": one}] if isinstance(one, str) else one
            for role, one in (("user", row["prompt"]), ("assistant", row["completion"]))
        )
        first = len(messages_of(name, prompt))
        messages = [*messages_of(name, prompt), *messages_of(name, completion)]
    else:
        messages = messages_of(name, row[kind])
    answers = [
        one for one in messages[first:] if one["role"] == "assistant" and (one.get("content") or one.get("tool_calls"))
    ]
    if masked and not answers:
        raise RunError(
            f"data: {name} has no answer of the role 'assistant' to learn: leave it out, or use loss_on = 'all'"
        )
    return {"messages": messages, "tools": row.get("tools"), "first": first if masked else None}


def _rendered(path: Path, conversations: list[Row], folder: Path) -> list[Passage]:
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
        raise BackendError(f"the conversations of {path} need transformers: {how_to_install(ENGINE)}")
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(
            f"data: {path}: the tokenizer of {folder} does not write conversations ({words[-1]:.200}): put a chat_template.jinja "
            "there, or give text"
        )
    return [
        Passage(text, f"row {number} of {path}", None if places is None else tuple(map(tuple, places)))
        for number, (text, places) in enumerate(json.loads(done.stdout), start=1)
    ]
