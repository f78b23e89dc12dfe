"""A job for a reader, and its answers: the same for all reader scripts. Runs in environments without qkit."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(read: Callable[..., dict[str, Any]]) -> None:
    """Calls `read(folder, tokens, prompt, **options)` for each row of the job `sys.argv[1]`, and writes answers to `sys.argv[2]`.

    An answer is a line of JSON: `name`, and either what `read` returns (`logprobs` of the tokens after the first [rows][length],
    `text` that follows the prompt) or an `error`.
    """
    sys.modules["qkit"] = None  # type: ignore[assignment]  # a reader that imports it fails
    job = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("w") as out:
        for row in job["rows"]:
            try:
                found = read(row["folder"], row["tokens"], row["prompt"], **row.get("options", {}))
            except Exception as error:  # a refusal is an answer, too
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"}
            out.write(json.dumps({"name": row["name"], **found}) + "\n")
            out.flush()
