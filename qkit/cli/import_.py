"""`qkit import DIR OUT`: another tool's quantized model as an artifact of qkit's. The work is in `qkit.exchange`."""

from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import console
from qkit.cli.export import WeightsOnly
from qkit.storage.destination import check_directory


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of llm-compressor's or mlx-lm's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the artifact goes.")],
    weights_only: WeightsOnly = False,
) -> None:
    """Read a model that another tool quantized, codes untouched, or say why that cannot be."""
    from qkit.exchange.import_model import read_model, to_artifact  # here, so that other commands start fast
    from qkit.exchange.write_model import weights_only as without_activations

    check_directory(out)
    source = read_model(folder)
    if weights_only:
        source = without_activations(source)
    to_artifact(source, out)
    console.print(f"{out}: {len(source.weights)} quantized weights and {len(source.tensors)} other tensors")
