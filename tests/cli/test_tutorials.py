"""The three tutorials in a new environment, from the first command to the last, by a shell: `make test-install` runs them.

The hub may be out of reach, so `hf` copies a small model that is made here, and training is short. A server of another program is
asked where it is installed: vLLM's own environment is given by $QKIT_VLLM.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from shutil import copytree, ignore_patterns

import pages
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = {
    "cuda": "trained/model.safetensors",
    "mac": "trained-mlx/model.safetensors",
    "ptq": "out/model.safetensors",
}
#: Commands that need the network's models, or serve for ever.
HUB = "hf download Qwen/Qwen3-0.6B --local-dir model"
SERVER = re.compile(r"^(python3 -m venv ~/vllm-env|~/vllm-env|curl )")


def script(page, model):
    """The page as a shell script, with short training and the model at hand."""
    lines = ["set -euo pipefail"]
    for kind, name, body in pages.steps(page):
        assert kind in ("command", "file"), body
        if kind == "file":
            for long, short in pages.SHORT.items():
                body = body.replace(long, short)
            lines.append(f"cat > {name} <<'END_OF_FILE'\n{body}END_OF_FILE")
        elif body == HUB:
            lines.append(f"cp -rL {shlex.quote(str(model))} model")
        elif not SERVER.match(body):
            few = pages.FEW.get(body.split()[1], []) if body.startswith("qkit ") else []
            lines.append(" ".join([body.partition("  #")[0], *few]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_a_script_that_ends_in_a_server_or_an_answer(name):
    page = (ROOT / "docs" / "start" / f"{name}.md").read_text(encoding="utf-8")
    commands = [body for kind, _, body in pages.steps(page) if kind == "command"]
    text = script(page, Path("model"))
    assert HUB in commands
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    ends = {"cuda": "vllm serve trained/", "mac": "mlx_lm.generate --model trained-mlx/", "ptq": "qkit eval"}
    assert any(ends[name] in body for body in commands)


@pytest.mark.network
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_goes_from_a_new_environment_to_a_served_model(name, tmp_path):
    page = (ROOT / "docs" / "start" / f"{name}.md").read_text(encoding="utf-8")
    if name == "ptq":  # it begins with an environment
        page = '```console\n$ python3 -m venv ~/env\n$ . ~/env/bin/activate\n$ pip install ".[cuda]"\n```\n' + page
    checkout, home = tmp_path / "qkit", tmp_path / "home"
    home.mkdir()
    copytree(ROOT, checkout, ignore=ignore_patterns(".git", ".venv", "site", "dist", ".*_cache", ".readers", "results"))
    (tmp_path / "made").mkdir()
    place = pages.furnish(tmp_path / "made")
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash"],
        input=script(page, place / "model"),
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and re.search("NewConnectionError|Temporary failure in name resolution", done.stderr):
        pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outputs = list(tmp_path.rglob(TUTORIALS[name]))
    assert outputs
    server = os.environ.get("QKIT_VLLM")
    if name == "cuda" and server:
        answer = "from vllm import LLM; print(LLM(__import__('sys').argv[1]).generate(['1?'])[0].outputs[0].text)"
        command = [f"{server}/bin/python", "-c", answer, str(outputs[0].parent)]
        served = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert served.returncode == 0, served.stderr[-3000:]
