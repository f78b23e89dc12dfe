"""Opens artifacts of qkit's in other programs, and writes the table: `python tests/readers/run.py [--only WORD ...]`.

Every reader is a script in an environment without qkit. Environments lie in `$QKIT_READERS` (default `.readers`) and are made
where they are missing; `--environment NAME=FOLDER` takes one that is there, such as a build of vLLM. The law's log-probabilities
are those of transformers on the float model with the values of the codes; for recipes that quantize activations, those of the
converted model on torch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from recipes import ACTIVATIONS, MODELS, READERS, RECIPES, REQUIREMENTS, options, refusal, tried, within

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
HOME = Path(os.environ.get("QKIT_READERS", ".readers"))
READY = "ready"  #: a file in an environment that is made whole
PROMPT = "import os"
ROWS, LENGTH = 2, 48


def main() -> int:
    """Runs the rows whose model, recipe or reader contains each word of `--only`, and merges them into the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="words of `model | recipe | reader`")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=FOLDER", help="an environment that is there"
    )
    given = parser.parse_args()
    words = given.only
    for pair in given.environment:
        link(*pair.split("=", 1))
    chosen = [
        (model, recipe, reader)
        for model in MODELS
        for recipe in RECIPES
        for reader, about in READERS.items()
        if recipe in about.recipes
        and tried(model, recipe)
        and all(word in f"{model} | {recipe} | {reader}" for word in words)
    ]
    if not (HOME / "models" / MODELS[-1] / "config.json").exists():
        run("transformers", "make_models.py", str(HOME / "models"))
    found = {tuple(row[:3]): row[3] for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for model in MODELS:
        recipes = [recipe for recipe in RECIPES if any(row[:2] == (model, recipe) for row in chosen)]
        if not recipes:
            continue
        laws = expected(model, recipes)
        for name, reader in READERS.items():
            rows = [row[1] for row in chosen if row[0] == model and row[2] == name]
            said = {recipe: written(model, recipe, reader.layout) for recipe in rows}
            asked = [
                {"name": recipe, "folder": place(model, recipe, reader.layout), "options": options(recipe, name)}
                for recipe in rows
                if not said[recipe]
            ]
            answers = [{"name": recipe, "error": words} for recipe, words in said.items() if words]
            for answer in [*answers, *ask(reader.environment, reader.script, model, asked)]:
                row = (model, answer["name"], name)
                found[row] = verdict(row, answer, laws.get(answer["name"]))
                print(" | ".join(row), "|", found[row], flush=True)
            RESULTS.write_text(json.dumps([[*key, value] for key, value in sorted(found.items())], indent=0) + "\n")
    return int(any(found[row].startswith("WRONG") for row in chosen if row in found))


def expected(model: str, recipes: list[str]) -> dict[str, np.ndarray]:
    """The law's log-probabilities of each recipe of which an artifact was made."""
    import qkit

    made = [recipe for recipe in recipes if not written(model, recipe, "artifact")]
    dense = [recipe for recipe in made if recipe not in ACTIVATIONS and not written(model, recipe, "dense")]
    asked = [{"name": recipe, "folder": place(model, recipe, "dense")} for recipe in dense]
    laws = {a["name"]: np.array(a["logprobs"]) for a in ask("transformers", "read_transformers.py", model, asked)}
    for recipe in set(made) - set(laws):
        tokens = np.array(tokens_of(model))
        logits = (
            qkit.backend("torchao").logits(qkit.load(place(model, recipe, "artifact")), tokens)[:, :-1].astype(float)
        )
        logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
            -1, keepdims=True
        )
        laws[recipe] = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return laws


def verdict(row: tuple[str, str, str], answer: dict, law: np.ndarray | None) -> str:
    """The cell of the table: the difference from the law, the reason for a known refusal, or WRONG and why."""
    reason = refusal(*row)
    if "error" in answer or law is None:
        return f"refused: {reason}" if reason else f"WRONG: {answer['error']}"
    far = float(np.abs(np.array(answer["logprobs"]) - law).max())
    if reason:
        return f"WRONG: opens, {far:.0e} from the law, although it was said to refuse: {reason}"
    equal = far <= within(*row[1:]) and answer["text"]
    return f"{far:.0e}" if equal else f"WRONG: {far:.1e} from the law, {answer['text']!r}"


def written(model: str, recipe: str, layout: str) -> str:
    """Writes the directory of this layout where it is missing. Returns why it could not be; empty where it is there."""
    from typer.testing import CliRunner

    from qkit.cli.application import application

    out = Path(place(model, recipe, layout))
    if out.exists():
        return ""
    out.parent.mkdir(parents=True, exist_ok=True)
    words = (
        ["quantize", str(HOME / "models" / model), str(out), "--recipe", *recipe.split()]
        if layout == "artifact"
        else ["export", place(model, recipe, "artifact"), str(out), "--to", layout]
    )
    done = CliRunner().invoke(application, words)
    return done.output.strip() if done.exit_code else ""


def place(model: str, recipe: str, layout: str) -> str:
    """The directory of `model` by `recipe` in a layout."""
    return str((HOME / "made" / layout / model / recipe.replace(" --", "-")).absolute())


def tokens_of(model: str) -> list[list[int]]:
    """Tokens of a text that the models were not trained on: this file."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(HOME / "models" / model / "tokenizer.json")).encode(Path(__file__).read_text()).ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(ROWS)]


def ask(environment: str, script: str, model: str, rows: list[dict]) -> list[dict]:
    """The answers of a reader's script; see `asked`."""
    if not rows:
        return []
    with tempfile.TemporaryDirectory() as work:
        job, answers = Path(work, "job.json"), Path(work, "answers.jsonl")
        job.write_text(json.dumps({"rows": [{"tokens": tokens_of(model), "prompt": PROMPT, **row} for row in rows]}))
        run(environment, script, str(job), str(answers))
        return [json.loads(line) for line in answers.read_text().splitlines()]


def run(environment: str, script: str, *arguments: str) -> None:
    """Runs a script of this folder in an environment, which is made if it is missing. Its words go to a log."""
    home = HOME / environment
    if not home.is_symlink() and not (home / READY).exists():
        install(home, REQUIREMENTS[environment])
    with (HOME / f"{environment}.log").open("a") as log:
        subprocess.run([home / "bin" / "python", HERE / script, *arguments], check=True, stdout=log, stderr=log)


def install(home: Path, requirements: list[str]) -> None:
    """Makes an environment, from the start where an earlier attempt was interrupted."""
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    if home.name == "vllm":  # these wheels and its torch do not load together, and text needs none of them
        audio_and_video = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *audio_and_video], check=True)
    (home / READY).touch()


def link(environment: str, folder: str) -> None:
    """Has an environment that is there used under this name, now and later."""
    if environment not in REQUIREMENTS or not (Path(folder) / "bin" / "python").exists():
        sys.exit(
            f"--environment {environment}={folder}: want one of {', '.join(REQUIREMENTS)} and a virtual environment"
        )
    home = HOME / environment
    if home.is_symlink():
        home.unlink()
    elif home.exists():
        sys.exit(f"{home} is an environment of its own: remove it first")
    HOME.mkdir(parents=True, exist_ok=True)
    home.symlink_to(Path(folder).absolute())


if __name__ == "__main__":
    sys.exit(main())
