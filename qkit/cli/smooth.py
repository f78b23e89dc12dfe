"""`qkit smooth MODEL OUT --stats STATS`: a float model of the same function for recipes that quantize inputs."""

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import Json, console, print_json
from qkit.fitting.statistics import open_statistics


def smooth(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A float model's Hugging Face directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The smoothed model, written whole or not at all.")],
    stats: Annotated[Path, typer.Option("--stats", metavar="STATS", help="Statistics of qkit calibrate.")],
    strength: Annotated[
        float, typer.Option(help="How much of the spread of inputs moves to the weights, from 0 to 1.")
    ] = 0.5,
    as_json: Json = False,
) -> None:
    """Move the spread of layers' inputs into their weights, and keep the model's function; quantize OUT then (SmoothQuant)."""
    from qkit.smoothing import smooth as write  # here, so that other commands start fast
    from qkit.smoothing import summary

    found = write(model, out, open_statistics(stats), strength=strength)
    norms = summary(found)
    if as_json:
        print_json({"out": str(out), "norms": norms})
        return
    ends = [end for pair in norms.values() for end in pair]
    span = f", inputs divided by {min(ends):g} to {max(ends):g}" if ends else ""
    console.print(f"{out}: {len(norms)} norms are smoothed{span}", highlight=False)
