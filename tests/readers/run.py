"""Opens artifacts of qkit's in other programs, and writes the table: `python tests/readers/run.py [--only WORD ...]`.

Every reader is a script in an environment without qkit. Environments lie in `$QKIT_READERS` (default `.readers`) and are made
where they are missing; `--environment NAME=FOLDER` takes one that is there, such as a build of vLLM. The law's log-probabilities
are those of transformers on the float model with the values of the codes; for recipes that quantize activations, those of the
converted model on torch.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import records
import table

from recipes import ACTIVATIONS, MODELS, PARTS, READERS, RECIPES, REQUIREMENTS, options

HERE = Path(__file__).parent
HOME = Path(os.environ.get("QKIT_READERS", ".readers"))
READY = "ready"  #: a file in an environment that is made whole
PROMPT = "import os"
ROWS, LENGTH = 2, 48
ERROR = 300  #: characters of an error that a row has


def main() -> int:
    """Runs the rows whose model, recipe or reader contains each word of `--only`, and merges them into the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="words of `model | recipe | reader`")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result of these models")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=FOLDER", help="an environment that is there"
    )
    given = parser.parse_args()
    for pair in given.environment:
        link(*pair.split("=", 1))
    if not (HOME / "models" / MODELS[-1] / "config.json").exists():
        run("transformers", "make_models.py", str(HOME / "models"))
    for earlier in (HOME / "made").glob("*"):
        if earlier.name != records.code():
            shutil.rmtree(earlier)
    weights = {model: records.digest_of(HOME / "models" / model) for model in MODELS}
    found = {key: row for key, row in records.load().items() if row["weights"] == weights[row["model"]]}
    chosen = [
        key
        for key in records.all_keys()
        if all(word in " | ".join(key) for word in given.only) and not (given.missing and key in found)
    ]
    for model in MODELS:
        recipes = [recipe for recipe in RECIPES if any(key[:2] == (model, recipe) for key in chosen)]
        laws = expected(model, recipes) if recipes else {}
        for reader in READERS:
            rows = [recipe for one, recipe, name in chosen if (one, name) == (model, reader)]
            for row in opened(model, rows, reader, laws) if rows else ():
                row = records.sealed({**row, "weights": weights[model], "qkit": records.code()})
                key = (model, row["recipe"], reader)
                found[key] = row
                print(" | ".join(key), "|", records.verdict(row), flush=True)
            records.write(found)
    table.write()
    return int(any(records.verdict(found[key]).startswith("WRONG") for key in chosen))


def opened(model: str, recipes: list[str], reader: str, laws: dict[str, np.ndarray]) -> Iterator[dict]:
    """The row of each recipe: what the reader said of its directory, and from which inputs."""
    about = READERS[reader]
    said = {recipe: written(model, recipe, about.layout) for recipe in recipes}
    asked = [
        {"name": recipe, "folder": place(model, recipe, about.layout), "options": options(recipe, reader)}
        for recipe in recipes
        if not said[recipe]
    ]
    answers = [{"name": recipe, "error": words} for recipe, words in said.items() if words]
    for answer in [*answers, *ask(about.environment, about.script, model, asked)]:
        recipe = answer["name"]
        row = {"model": model, "recipe": recipe, "reader": reader}
        folder = Path(place(model, recipe, about.layout))
        row["opened"] = records.digest_of(folder) if not said[recipe] else ""
        row |= {"script": records.script(about), "versions": versions(about.environment)}
        if "error" in answer:
            yield row | {
                "error": answer["error"].replace(str(folder), folder.name).replace(f"{HOME.absolute()}/", "")[:ERROR]
            }
        else:
            far = float(np.abs(np.array(answer["logprobs"]) - laws[recipe]).max())
            yield row | {"far": far, "text": answer["text"]}


@cache
def versions(environment: str) -> str:
    """The packages of an environment that have a part in its answers, with their versions."""
    words = "from importlib.metadata import distributions; print({d.name: d.version for d in distributions()})"
    python = HOME / environment / "bin" / "python"
    done = subprocess.run([python, "-c", words], check=True, capture_output=True, text=True)
    there = ast.literal_eval(done.stdout)
    return ", ".join(f"{name} {there[name]}" for name in PARTS[environment])


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
    return (done.output.strip() or f"{type(done.exception).__name__}: {done.exception}") if done.exit_code else ""


def place(model: str, recipe: str, layout: str) -> str:
    """The directory of `model` by `recipe` in a layout, as the present code writes it."""
    return str((HOME / "made" / records.code() / layout / model / recipe.replace(" --", "-")).absolute())


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
    """Runs a script of this folder in an environment, which is made if it is missing, on one thread. Its words go to a log."""
    home = HOME / environment
    if not home.is_symlink() and not (home / READY).exists():
        install(home, REQUIREMENTS[environment])
    words, alone = [home / "bin" / "python", HERE / script, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    with (HOME / f"{environment}.log").open("a") as log:
        subprocess.run(words, env=alone, check=True, stdout=log, stderr=log)


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
