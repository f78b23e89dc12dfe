"""`qkit merge BASE ADAPTER OUT`: merges an adapter into the base that it was trained on."""

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
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder of peft, mlx-lm or qkit.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The directory of the artifact, written whole or not at all.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file. Left out: the artifact's own.",
        ),
    ] = None,
    backend: Engine = None,
) -> None:
    """Merge an adapter into its base, on the grid of its training. The codes are those of the last step."""
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
