"""`qkit mlx-lora MODEL OUT --recipe R ...`: `mlx_lm.lora` or `mlx_lm_lora.train` on a grid. The work is in `qkit.training`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.completing import recipe_names
from qkit.cli.console import Json, console, print_json
from qkit.cli.quantize import SkipIndivisible

#: A command line of the tools themselves begins so. Its `--model` and `--adapter-path` are the model and the artifact.
LINE = re.compile(
    r"(python[\d.]* -m )?(mlx_lm\.lora|mlx_lm lora|mlx_lm_lora\.train|mlx_lm_lora train|mlx_lm_lora)( |$)"
)


def mlx_lora(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, float; or the word mlx_lm_lora.train.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory of the artifact.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file. Left out: the grid of --qat-bits or --load-in-4bits.",
            autocompletion=recipe_names,
        ),
    ] = None,
    skip_indivisible: SkipIndivisible = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Train adapters on packed codes, as on a model loaded in few bits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train by mlx_lm.lora, or by mlx_lm_lora.train where an option is its own. All other options are that command's.

    A whole command line of theirs may follow, as in qkit mlx-lora mlx_lm_lora.train --model MODEL --adapter-path OUT.
    """
    from qkit.training.commands import run_mlx_lora  # here, so that other commands start fast

    words = [model, out, *context.args]
    options = {"packed": packed, "skip_indivisible": skip_indivisible}
    if begin := LINE.match(" ".join(words)):
        shipped = run_mlx_lora(None, None, recipe, words[len(begin[0].split()) :], **options)
    else:
        shipped = run_mlx_lora(Path(model), Path(out), recipe, context.args, **options)
    if as_json:
        counts = {"quantized_layers": shipped.quantized_layers, "changed_layers": shipped.changed_layers}
        print_json({"out": str(shipped.folder), **counts})
        return
    console.print(
        f"{shipped.folder}: the artifact; {shipped.changed_layers:,} of {shipped.quantized_layers:,} layers have changed codes",
        highlight=False,
    )
