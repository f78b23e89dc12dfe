"""A small model and its data, on which extras do their jobs."""

import json
from pathlib import Path

import pytest
from models import make

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for jobs; see `tests/jobs.py`."""
    folder = tmp_path_factory.mktemp("job")
    make(folder / "model", "llama")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    known = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({**known, "eos_token": "!"}))
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}; " for i in range(200)))
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * i}"}] for i in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns))
    return folder
