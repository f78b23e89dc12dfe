"""The README's paths to the answers of vLLM, mlx-lm and llama.cpp, and those of the page "Serve", command by command."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from typer.testing import CliRunner

from qkit.cli.application import application

sys.path.insert(0, str(Path(__file__).parent))
import run as readers

ROOT = Path(__file__).parents[2]
SERVE = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8").partition("\n## ")[0]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    name: [body.partition("  #")[0].strip() for kind, _, body in pages.steps(text) if kind == "command"]
    for name, text in (("README", README), ("serve", SERVE))
}
FILES = {name: body for kind, name, body in pages.steps(README) if kind == "file"}
pytestmark = [
    pytest.mark.readers,
    pytest.mark.filterwarnings("ignore:training changed no code", "ignore::qkit.errors.FewTokensWarning"),
]


def run(page, *names):
    """Runs the commands of a page that write one of `names`, with few steps where they train or calibrate."""
    for command in COMMANDS[page]:
        words = shlex.split(command)
        if words[0] == "qkit" and words[3] in names:
            done = CliRunner().invoke(application, [*words[1:], *pages.FEW.get(words[1], [])])
            assert done.exit_code == 0, (done.output, done.exception)


def answer_of(environment, script, folder, **options):
    row = {"name": folder.name, "folder": str(folder), "options": options}
    (answer,) = readers.ask(environment, script, "llama", [row])
    return answer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the trained Llama, texts and conversations, under the README's names."""
    monkeypatch.setattr(readers, "HOME", readers.HOME.absolute())
    monkeypatch.chdir(pages.furnish(tmp_path, model=readers.HOME / "models" / "llama"))
    return tmp_path


def test_vllms_server_answers_for_the_model_that_the_readme_trains(place):
    assert COMMANDS["README"].index("vllm serve trained/") > COMMANDS["README"].index("python full.py")
    (place / "full.py").write_text(pages.shortened(FILES["full.py"]))
    subprocess.run([sys.executable, "full.py"], check=True)
    answer = answer_of("vllm", "read_vllm.py", place / "trained", serve=True, dtype="bfloat16")
    assert answer.get("text"), json.dumps(answer)


def test_vllms_server_answers_for_a_model_that_was_only_quantized(place):
    assert "vllm serve served/" in COMMANDS["serve"]
    run("serve", "served/")
    answer = answer_of("vllm", "read_vllm.py", place / "served", serve=True, dtype="bfloat16")
    assert answer.get("text"), json.dumps(answer)


def test_transformers_generates_from_the_same_directory(place):
    run("serve", "served/")
    assert answer_of("transformers", "read_transformers.py", place / "served").get("text")


@pytest.mark.parametrize(
    ("page", "names"), [("README", ("tuned/", "tuned-mlx/")), ("serve", ("served/", "mlx-served/"))]
)
def test_mlx_lm_generates_by_the_pages_own_command(page, names, place):
    run(page, *names)
    (command,) = [line for line in COMMANDS[page] if line.startswith("mlx_lm.generate ")]
    program, *rest = shlex.split(command)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    there = [readers.HOME / "mlx-lm" / "bin" / "python", "-m", *program.split("."), *rest, "--max-tokens", "8"]
    done = subprocess.run(there, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(r"Generation: (\d+) tokens", done.stdout)[1]) > 0, done.stdout


def test_llama_cpp_answers_for_the_model_that_the_readme_quantizes(place):
    """The server as PyPI packages it, or `llama-server` itself: `test_llama_cpp` runs that command as it stands."""
    assert "llama-server --model model.gguf --port 8080" in COMMANDS["README"]
    run("README", "stats/", "out/", "model.gguf")
    answer = answer_of("llama.cpp", "read_llama_cpp.py", place / "model.gguf")
    assert answer.get("text"), json.dumps(answer)
