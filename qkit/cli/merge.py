"""`qkit merge BASE ADAPTER OUT`: merges an adapter into the base that it was trained on."""

from pathlib import Path
from typing import Annotated

import typer

import qkit
from qkit.cli.completing import recipe_names
from qkit.cli.console import Json, console, errors, print_json
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
            autocompletion=recipe_names,
        ),
    ] = None,
    backend: Engine = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, on the grid.

    Exact for adapters that qkit trained, inside of the grid: the codes are those of the last step. Adapters that peft or mlx-lm
    trained beside the grid are rounded by the merge, which moves the loss; qkit says so.
    """
    from qkit import adapters  # here, so that other commands start fast
    from qkit.adapters import formats

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
    known = bool(formats.read(adapter).base)
    if not known:
        errors.print(
            f"{adapter} has no note by qkit, so it may be trained beside the grid: then the merge moves the loss; compare it by "
            "qkit eval",
            highlight=False,
        )
    bits = qkit.coverage(model).bits_per_weight
    if as_json:
        print_json({"out": str(out), "adapters": merged, "exact": known, "bits_per_weight": bits})
    else:
        console.print(f"{out}: {merged} adapters merged, {bits:.2f} bits per weight")
