"""Runs a page as its reader would: commands and blocks from the first to the last, in a folder with a small model and some text.

Commands of qkit and Python's blocks run in this process, and with few steps; `mlx_lm` and scripts run in their own. Commands of
programs that are not there, and those that fetch, are left out: `ELSEWHERE` names them.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from models import made_once, make
from typer.testing import CliRunner

from qkit.cli.application import application

ROOT = Path(__file__).parents[1]
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
TEXT = "".join(f"{i} squared is {i * i}; " for i in range(400))

#: Options that keep a command of qkit short.
FEW = {
    "train": ["--steps", "2", "--batch", "2", "--length", "16"],
    "calibrate": ["--length", "16"],
    "teach": ["--length", "16"],
    "compare": ["--length", "16"],
    "eval": ["--length", "16"],
}
#: And those of `plan`, where it measures.
BUDGET = ["--length", "16"]
#: Words of a script that say how long it trains.
SHORT = {"max_steps=100": "max_steps=1", "max_length=256": "max_length=32"}
#: Commands that no test runs: they fetch, install, or start a server of another program.
ELSEWHERE = re.compile(
    r"(pip|hf|git|make|vllm|llama-server|mlx_lm\.server|curl|mkdir|cd|\.|python3|~/vllm-env/bin/\w+) "
    r"|qkit (parity|demo|warmup|backends --probe)"
)


@made_once
def _model(folder):
    make(folder, "llama", hidden_size=64, intermediate_size=128)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, "eos_token": "!"}))
    return folder


def furnish(folder, *, model=None):
    """Puts a model, texts and conversations into `folder`, under the names that pages use. `model` is one that is there."""
    if model is None:
        _model(folder / "model")
    else:
        (folder / "model").symlink_to(model)
    (folder / "big").symlink_to("model")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(TEXT[:3000])
    (folder / "text.txt").write_text(TEXT[:3000])
    (folder / "other.txt").write_text(TEXT[3000:3400])
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * i}"}] for i in range(16)]
    for name in ("chat", "unseen"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns))
    return folder


def shortened(script):
    """A script of a page that trains for a step only."""
    for long, short in SHORT.items():
        script = script.replace(long, short)
    return script


def steps(text):
    """Kind, name and text of each step of a page: `command`, `block`, or `file` with its name."""
    for language, title, body in re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE
    ):
        if language == "bash":
            yield from (("command", "", line) for line in body.splitlines())
        elif language == "python":
            yield ("file", title, body) if title else ("block", "", body)


def run(text, *, engine="", left_out=()):
    """Runs a page in the current folder. Returns the commands that ran.

    Args:
        engine: the engine of commands that train and measure; empty: their own choice.
        left_out: words; a command with one of them does not run.
    """
    namespace, ran = {}, []
    for kind, name, body in steps(text):
        if kind == "file":
            Path(name).write_text(shortened(body))
        elif kind == "block":
            exec(compile(body, "page", "exec"), namespace)
        elif not ELSEWHERE.match(body) and not any(word in body for word in left_out):
            for command in (
                [body.replace("1/4", f"{part}/4") for part in range(1, 5)] if "--part 1/4" in body else [body]
            ):
                _run_command(command, engine)  # the other parts, as its comment says
            ran.append(body)
    return ran


def _run_command(line, engine):
    words = shlex.split(line, comments=True)
    if words[0] == "qkit":
        words, into = (words[:-2], words[-1]) if ">" in words else (words, None)
        few = BUDGET if "--budget" in words else FEW.get(words[1], [])
        done = CliRunner().invoke(
            application, [*words[1:], *few, *(["--backend", engine] if few and engine and words[1] != "plan" else [])]
        )
        assert done.exit_code == 0, (line, done.output, done.exception)
        if into:
            Path(into).write_text(done.stdout)
        return
    command = {
        "python": [sys.executable],
        "mlx_lm.generate": [sys.executable, "-m", "mlx_lm", "generate", "--max-tokens", "2"],
    }
    assert words[0] in command, line
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command[words[0]], *words[1:]], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
