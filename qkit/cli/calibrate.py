"""`qkit calibrate MODEL STATS --data FILES`: statistics for `qkit quantize --fit`. The work is in `qkit.calibration`."""

from pathlib import Path
from typing import Annotated

import typer

import qkit
from qkit.cli.completing import engine_names, recipe_names
from qkit.cli.console import Json, console, print_json
from qkit.cli.quantize import SkipIndivisible
from qkit.engines.abilities import require
from qkit.engines.blocks import Lesson
from qkit.engines.protocol import Builds
from qkit.overrides import overridden


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A float model's Hugging Face directory.")],
    out: Annotated[Path, typer.Argument(metavar="STATS", help="The new directory of statistics.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A text file, or a shell pattern in quotes. Repeat for more. Also jsonl and chats.",
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file: one that quantizes inputs, or whose drift to correct.",
            autocompletion=recipe_names,
        ),
    ] = None,
    drift: Annotated[
        bool, typer.Option("--drift", help="Correct, for --fit solve by this recipe, the drift of fitted blocks.")
    ] = False,
    learn: Annotated[
        bool,
        typer.Option(
            "--learn", help="Correct the drift, and learn which way to round, for --fit round by this recipe."
        ),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of --learn in each block.")] = Lesson().steps,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the windows in which --learn takes them.")] = 0,
    skip_indivisible: SkipIndivisible = False,
    length: Annotated[int, typer.Option(min=2, help="Tokens of one window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="The most windows, at even distances in the text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Windows that run at once.")] = 8,
    backend: Annotated[
        str | None, typer.Option(help="The engine. Left out: the first that is ready.", autocompletion=engine_names)
    ] = None,
    device: Annotated[str | None, typer.Option(help="The device of the engine, such as cpu or cuda.")] = None,
    as_json: Json = False,
) -> None:
    """Run a float model on a text, and store the second moments of its layers' inputs; interrupted, it goes on where it was."""
    from qkit.calibration import calibrate as gather  # here, so that other commands start fast
    from qkit.drift_calibration import calibrate_drift
    from qkit.evaluation import consecutive, read_alike

    engine = require(qkit.backend(backend), Builds)
    engine = engine.on(device) if device else engine
    rows = consecutive(read_alike([model], data).tokens, length=length - 1, windows=windows)
    chosen = overridden(qkit.recipe(recipe), skip_indivisible=skip_indivisible) if recipe else None
    if (drift or learn) and not chosen:
        raise typer.BadParameter(f"--{'learn' if learn else 'drift'} is of one recipe: add --recipe")
    wants = learn or (chosen is not None and any(rule.rounding == "learned" for rule in chosen.rules))
    if chosen and (drift or wants):
        lesson = Lesson(steps=steps, batch=batch, seed=seed) if wants else None
        calibrate_drift(model, out, rows, engine=engine, batch=batch, recipe=chosen, lesson=lesson)
    else:
        gather(model, out, rows, engine=engine, batch=batch, recipe=chosen)
    if as_json:
        print_json({"out": str(out), "tokens": int(rows.size), "windows": len(rows), "engine": engine.name})
    else:
        console.print(f"{out}: statistics of {rows.size:,} tokens", highlight=False)
