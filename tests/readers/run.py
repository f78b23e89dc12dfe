"""Opens artifacts of qkit's in other programs, and writes the table: `python tests/readers/run.py [--only WORD ...]`.

Every reader is a script in an environment without qkit. Environments lie in `$QKIT_READERS` (default `.readers`) and are made
where they are missing. The law's log-probabilities are those of transformers on the float model with the values of the codes; for
recipes that quantize activations, those of the converted model on torch.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from recipes import ACTIVATIONS, EMBEDDINGS, MODELS, READERS, RECIPES, REQUIREMENTS, TIED, options, within

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
HOME = Path(os.environ.get("QKIT_READERS", ".readers"))
PROMPT = "import os"
ROWS, LENGTH = 2, 48


def main() -> int:
    """Runs the rows whose model, recipe or reader contains each word of `--only`, and merges them into the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="words of `model | recipe | reader`")
    words = parser.parse_args().only
    chosen = [
        (model, recipe, reader)
        for model in MODELS
        for recipe in RECIPES
        for reader, about in READERS.items()
        if recipe in about.recipes and all(word in f"{model} | {recipe} | {reader}" for word in words)
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
            rows = [row for row in chosen if row[0] == model and row[2] == name and row[1] in laws]
            asked = [
                {"name": recipe, "folder": place(model, recipe, reader.layout), "options": options(recipe, name)}
                for _, recipe, _ in rows
                if written(model, recipe, reader.layout)
            ]
            for answer in ask(reader.environment, reader.script, model, asked):
                row = (model, answer["name"], name)
                found[row] = verdict(row, answer, laws[answer["name"]])
                print(" | ".join(row), "|", found[row], flush=True)
            RESULTS.write_text(json.dumps([[*key, value] for key, value in sorted(found.items())], indent=0) + "\n")
    return int(any(found[row].startswith("WRONG") for row in chosen if row in found))


def expected(model: str, recipes: list[str]) -> dict[str, np.ndarray]:
    """The law's log-probabilities of each recipe of which an artifact was made."""
    import qkit

    made = [recipe for recipe in recipes if written(model, recipe, "artifact")]
    dense = [recipe for recipe in made if recipe not in ACTIVATIONS and written(model, recipe, "dense")]
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


def verdict(row: tuple[str, str, str], answer: dict, law: np.ndarray) -> str:
    """The cell of the table: the difference from the law, the reason for a known refusal, or WRONG and why."""
    reason = READERS[row[2]].closed.get(row[1])
    if row[0] in TIED and row[1] in EMBEDDINGS and row[2].startswith("vLLM"):
        reason = "a tied head of codes; `--untie`"
    if "error" in answer:
        return f"refused: {reason}" if reason else f"WRONG: {answer['error']}"
    far = float(np.abs(np.array(answer["logprobs"]) - law).max())
    if reason:
        return f"WRONG: opens, {far:.0e} from the law, although it was said to refuse: {reason}"
    return (
        f"{far:.0e}"
        if far <= within(*row[1:]) and answer["text"]
        else f"WRONG: {far:.1e} from the law, {answer['text']!r}"
    )


def written(model: str, recipe: str, layout: str) -> bool:
    """Whether the directory of this layout is there, or could be written now."""
    from typer.testing import CliRunner

    from qkit.cli.application import application

    out = Path(place(model, recipe, layout))
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        source = [str(HOME / "models" / model)] if layout == "artifact" else [place(model, recipe, "artifact")]
        verb = ["quantize", *source, str(out), "--recipe", recipe]
        done = CliRunner().invoke(
            application, verb if layout == "artifact" else ["export", *source, str(out), "--to", layout]
        )
        if done.exit_code:
            print(model, recipe, layout, "not written:", done.output.strip(), flush=True)
    return out.exists()


def place(model: str, recipe: str, layout: str) -> str:
    """The directory of `model` by `recipe` in a layout."""
    return str((HOME / "made" / layout / model / recipe).absolute())


def tokens_of(model: str) -> list[list[int]]:
    """Tokens of a text that the models were not trained on: this file."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(HOME / "models" / model / "tokenizer.json")).encode(Path(__file__).read_text()).ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(ROWS)]


def ask(environment: str, script: str, model: str, rows: list[dict]) -> list[dict]:
    """The answers of a reader's script; see `asked`."""
    if not rows:
        return []
    work = HOME / "work"
    work.mkdir(parents=True, exist_ok=True)
    job, answers = work / "job.json", work / "answers.jsonl"
    job.write_text(json.dumps({"rows": [{"tokens": tokens_of(model), "prompt": PROMPT, **row} for row in rows]}))
    run(environment, script, str(job), str(answers))
    return [json.loads(line) for line in answers.read_text().splitlines()]


def run(environment: str, script: str, *arguments: str) -> None:
    """Runs a script of this folder in an environment, which is made if it is missing. Its words go to a log."""
    python = HOME / environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME / environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[environment]], check=True)
        if environment == "vllm":  # these wheels and its torch do not load together, and text needs none of them
            audio_and_video = ["torchvision", "torchaudio", "torchcodec"]
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *audio_and_video], check=True)
    with (HOME / f"{environment}.log").open("a") as log:
        subprocess.run([python, HERE / script, *arguments], check=True, stdout=log, stderr=log)


if __name__ == "__main__":
    sys.exit(main())
