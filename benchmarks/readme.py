"""The table of the README: one model in float, quantized by `--fit solve`, and trained on its grid; and the report of one recipe.

The model is that of fit_model.py. All work is done by qkit's own commands, which are printed.

Usage: python benchmarks/readme.py FOLDER [--steps N] [--device cuda] [--out FILE] [--picture FILE]
       python benchmarks/readme.py --table FILE
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import fit_model
import measure
from recover import texts

RECIPES = ("int4-g32", "int2-g32")
SHOWN = "int2-g32"  #: the recipe of the report
TRAIN = ("--batch", "8", "--length", "256", "--learning-rate", "5e-4", "--seed", "0")
EVAL = ("--length", "256", "--windows", "48")
NEW, REPEATS = 64, 5  #: tokens of one answer, and answers


def main() -> None:
    """Measures, or prints the table of a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))))
        return
    about = {
        "model": "fit_model.py, 1.7m",
        "steps": given.steps,
        "training": TRAIN,
        "evaluation": EVAL,
        "ptq": "--fit solve",
    }
    report = measure.Report(given.out, device=given.device, packages=("transformers",), about=about)
    common = ("--backend", "torchao", "--device", given.device)
    _prepare(given.folder, given.steps, common)
    losses = _losses(given.folder, common)
    for name in ("model", "longer", *RECIPES):
        folder = given.folder / name if name in ("model", "longer") else given.folder / f"qat-{name}"
        report.add(
            {
                "recipe": "float" if name == "model" else name,
                **_size(folder),
                **_speed(folder, given.device),
                **losses[name],
            }
        )
    report.finish()
    if given.picture:
        _qkit(
            given.folder, "compare", "model", "--qat", f"qat-{SHOWN}", "--ptq", f"ptq-{SHOWN}", "--longer", "longer",
            "--data", "held-out.txt", *EVAL, "--out", "report", *common,
        )  # fmt: skip
        shutil.copy(given.folder / "report" / "report.png", given.picture)


def _prepare(folder: Path, steps: int, common: tuple[str, ...]) -> None:
    """Makes the directories that are missing: the model, its text, statistics, and each recipe's two directories."""
    if not (folder / "model" / "config.json").exists():
        fit_model.make(folder / "model", size="1.7m", steps=2800, batch=8)
    for name, bytes_ in zip(("text.txt", "held-out.txt"), texts(), strict=True):
        (folder / name).write_bytes(bytes(bytes_.astype("uint8")))
    data = ("--data", "text.txt")
    few = (folder / "held-out.txt").read_bytes()[:8192]  # for the curve of training; the table is of the whole
    (folder / "few.txt").write_bytes(few)
    watched = ("--held-out", "few.txt", "--evaluate-every", str(steps // 2))
    training = (*data, *common, "--steps", str(steps), *TRAIN, *watched)
    if not (folder / "longer").exists():
        _qkit(folder, "train", "model", "longer", "--recipe", "float", *training)
    if not (folder / "stats").exists():
        _qkit(folder, "calibrate", "model", "stats", "--data", "text.txt", "--length", "256", *common)
    for recipe in RECIPES:
        if not (folder / f"ptq-{recipe}").exists():
            fit = ("--fit", "solve", "--stats", "stats")
            _qkit(folder, "quantize", "model", f"ptq-{recipe}", "--recipe", recipe, *fit)
        if not (folder / f"qat-{recipe}").exists():
            _qkit(folder, "train", "model", f"qat-{recipe}", "--recipe", recipe, *training)


def _qkit(folder: Path, *words: str) -> str:
    print("$ qkit", *words, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "qkit", *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def _losses(folder: Path, common: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Held-out losses in nats, by recipe."""
    names = ["model", "longer", *(f"{kind}-{recipe}" for recipe in RECIPES for kind in ("ptq", "qat"))]
    found = json.loads(_qkit(folder, "eval", *names, "--data", "held-out.txt", *EVAL, *common, "--json"))
    losses = {Path(row["directory"]).name: round(row["loss"], 4) for row in found["models"]}
    rows = {name: {"loss": losses[name]} for name in ("model", "longer")}
    return rows | {recipe: {"ptq": losses[f"ptq-{recipe}"], "qat": losses[f"qat-{recipe}"]} for recipe in RECIPES}


def _size(folder: Path) -> dict[str, float]:
    weights = (folder / "model.safetensors").stat().st_size
    return {"megabytes": round(weights / 1e6, 3)}


def _speed(folder: Path, device: str) -> dict[str, Any]:
    """Tokens a second of greedy answers by transformers' `generate`, of the model that qkit opens."""
    import torch

    import qkit

    model = qkit.load(folder, backend=qkit.backend("torchao").on(device)).eval()
    prompt = torch.tensor([list(b"import os\n")], device=device)

    def answer() -> float:
        start = perf_counter()
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return NEW / (perf_counter() - start)

    answer()
    return {"tokens/s": measure.spread([answer() for _ in range(REPEATS)], 1)}


def table(result: dict[str, Any]) -> str:
    """The README's table of a result."""
    rows = {row["recipe"]: row for row in result["rows"]}
    float_, longer = rows["float"], rows["longer"]
    lines = ["| recipe | bits | file | loss: PTQ | loss: QAT | tokens/s |", "|---|---|---|---|---|---|"]
    pair = f"{float_['loss']:.3f} | {longer['loss']:.3f}"
    lines.append(f"| float32; trained as long as QAT | 32 | {float_['megabytes']:.1f} MB | {pair} | {_rate(float_)} |")
    lines += [
        f"| `{name}` | {_bits(name):.1f} | {row['megabytes']:.1f} MB | {row['ptq']:.3f} | {row['qat']:.3f} | {_rate(row)} |"
        for name, row in rows.items()
        if "ptq" in row
    ]
    return "\n".join(lines)


def _bits(recipe: str) -> float:
    """Bits per weight, of a layer of the model."""
    import qkit

    (grid,) = {rule.weight for rule in qkit.recipe(recipe).rules if rule.weight}
    return grid.bits_per_weight((192, 192))


def _rate(row: dict[str, Any]) -> str:
    return f"{row['tokens/s']['median']:.0f}"


if __name__ == "__main__":
    main()
