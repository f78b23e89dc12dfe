"""`qkit mlx-lora MODEL OUT --recipe R ...`: `mlx_lm.lora` or `mlx_lm_lora.train` on a grid. The work is in `qkit.training`."""

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import console


def mlx_lora(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face directory, float.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory of the artifact.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe, an alias or a TOML file.")],
    packed: Annotated[
        bool, typer.Option("--packed", help="Train adapters on packed codes, as on a model loaded in few bits.")
    ] = False,
) -> None:
    """Train by mlx_lm.lora, or by mlx_lm_lora.train where --train-mode is given. All other options are that command's."""
    from qkit.training.commands import run_mlx_lora  # here, so that other commands start fast

    shipped = run_mlx_lora(model, out, recipe, context.args, packed=packed)
    console.print(
        f"{out}: the artifact; {shipped.changed_layers:,} of {shipped.quantized_layers:,} layers have changed codes",
        highlight=False,
    )
