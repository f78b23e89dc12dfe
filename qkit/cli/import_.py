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
    from qkit.exchange import transfer  # here, so that other commands start fast
    from qkit.exchange.snapshot import read

    check_directory(out)
    source = read(folder)
    if weights_only:
        source = transfer.weights_only(source)
    transfer.to_artifact(source, out)
    console.print(f"{out}: {len(source.weights)} quantized weights and {len(source.tensors)} other tensors")
