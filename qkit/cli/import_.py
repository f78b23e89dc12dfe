"""`qkit import DIR OUT`: another tool's quantized model as an artifact of qkit's. The work is in `qkit.exchange`."""

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import Json, console, print_json
from qkit.cli.export import WeightsOnly
from qkit.storage.destination import check_directory


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that another program quantized.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory of the artifact.")],
    weights_only: WeightsOnly = False,
    minmax: Annotated[
        bool,
        typer.Option("--minmax", help="Read weights of mlx-lm whose biases are whole numbers of scales as minmax."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model that another tool quantized as an artifact, with the same codes, or refuse it by name."""
    from qkit.exchange.import_model import read_model, to_artifact  # here, so that other commands start fast
    from qkit.exchange.write_model import weights_only as without_activations

    check_directory(out)
    source = read_model(folder, minmax=minmax)
    if weights_only:
        source = without_activations(source)
    to_artifact(source, out)
    if as_json:
        counts = {"quantized_weights": len(source.weights), "other_tensors": len(source.tensors)}
        print_json({"out": str(out), **counts, "notes": list(source.notes)})
        return
    for note in source.notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"{out}: {len(source.weights)} quantized weights and {len(source.tensors)} other tensors")
