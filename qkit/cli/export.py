"""`qkit export DIR OUT --to mlx`: writes a model for another program, with the same codes. The work is in `qkit.exchange`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import console
from qkit.storage.destination import check_directory, check_file

WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Drop the quantization of inputs and outputs. The logits change.")
]


class Target(StrEnum):
    """The layouts that `qkit export` writes."""

    mlx = "mlx"
    gguf = "gguf"
    dense = "dense"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model that qkit, llm-compressor or mlx-lm wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The exported model: a directory; for gguf, a file.")],
    to: Annotated[
        Target, typer.Option(help="mlx: for mlx-lm. gguf: for llama.cpp. dense: the values, as a float model.")
    ],
    weights_only: WeightsOnly = False,
) -> None:
    """Write a model for another program: the same codes under other names, exactly, or not at all."""
    from qkit.exchange import export_model, write_model  # here, as the next two, so that other commands start fast
    from qkit.exchange.export_gguf import export_gguf
    from qkit.exchange.import_model import read_model

    (check_file if to is Target.gguf else check_directory)(out)
    source = read_model(folder)
    if weights_only:
        source = write_model.weights_only(source)
    if to is Target.gguf:
        write_model.check_weights_only(source, source.weights)
        export_gguf(source, out)
    else:
        {Target.mlx: export_model.export_mlx, Target.dense: export_model.export_dense}[to](source, out)
    console.print(
        f"{out}: {len(source.weights)} quantized weights, {len(source.tensors)} other tensors, for {to.value}"
    )
    if to is Target.gguf:
        console.print(f"without a tokenizer: give the program that of {folder}")
