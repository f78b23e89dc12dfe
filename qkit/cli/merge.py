"""`qkit merge BASE ADAPTER OUT`: a base and an adapter that was trained on it, to the artifact that was trained."""

from pathlib import Path
from typing import Annotated

import typer

import qkit
from qkit.cli.console import console
from qkit.cli.eval import Engine
from qkit.pipeline import surgeon
from qkit.storage.destination import check_directory


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A Hugging Face directory, or an artifact of qkit's.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A folder of peft's, of mlx-lm's or of qkit's own.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to: made whole, or not at all.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file: an artifact's own, if left out.",
        ),
    ] = None,
    backend: Engine = None,
) -> None:
    """Merge an adapter into its base, on the grid it was trained on: the codes are those of the last step."""
    from qkit import adapters  # here, so that other commands start fast

    check_directory(out)
    model = qkit.load(base, backend=backend)
    if recipe is not None:
        model = qkit.prepare(model, recipe)
    model = adapters.load(model, adapter)
    merged = sum(bool(layer.adapter) for layer in surgeon(model, None).layers(model))
    model = qkit.merge(model)
    if recipe is not None:
        model = qkit.convert(model)
    qkit.save(model, out, source=base)
    console.print(f"{out}: {merged} adapters merged, {qkit.coverage(model).bits_per_weight:.2f} bits per weight")
