"""`qkit export DIR OUT --to mlx`: writes a model for another program, with the same codes. The work is in `qkit.exchange`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qkit.cli.console import Json, console, print_json
from qkit.errors import ArtifactError
from qkit.storage.destination import check_directory, check_file

WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Drop the quantization of inputs and outputs. The logits change.")
]


WithoutTokenizer = Annotated[
    bool, typer.Option("--without-tokenizer", help="gguf: write no tokenizer. llama.cpp then takes no text.")
]


class Fallback(StrEnum):
    """The types of float that GGUF files hold values in."""

    f16 = "f16"


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
    fallback: Annotated[
        Fallback | None, typer.Option(help="gguf: weights that no type of GGUF holds become these floats, one by one.")
    ] = None,
    without_tokenizer: WithoutTokenizer = False,
    as_json: Json = False,
) -> None:
    """Write a model for another program: the same codes under other names, exactly, or not at all."""
    from qkit.exchange import export_model, write_model  # here, as the next two, so that other commands start fast
    from qkit.exchange.export_gguf import export_gguf
    from qkit.exchange.import_model import open_model, read_model
    from qkit.formats.gguf_rope import ignored_truncation
    from qkit.formats.gguf_tokenizer import read_vocabulary
    from qkit.formats.mlx_limits import limits_of

    if to is not Target.gguf and (fallback or without_tokenizer):
        raise ArtifactError(
            f"--fallback and --without-tokenizer belong to --to gguf, not to {to.value}: leave them out"
        )
    (check_file if to is Target.gguf else check_directory)(out)
    source = (read_model if to is Target.dense else open_model)(folder)
    if weights_only:
        source = write_model.weights_only(source)
    notes: list[str] = []
    if to is Target.gguf:
        write_model.check_weights_only(source, source.weights)
        vocabulary = None if without_tokenizer else read_vocabulary(source.folder, source.config or {})
        written = export_gguf(source, out, vocabulary=vocabulary, fallback=fallback.value if fallback else None)
        notes = [f"{count} as {kind}" for kind, count in written.kinds.items()]
        notes = [f"quantized weights: {', '.join(notes)}"] if notes else []
        notes += [f"{name} as float16: {reason}" for name, reason in written.fallbacks.items()]
        notes += [*written.notes, *filter(None, [ignored_truncation(source.config or {})])]
    elif to is Target.mlx:
        as_values = export_model.export_mlx(source, out)
        notes = [f"{path} as its values: mlx-lm would split its codes and quantize them again" for path in as_values]
        notes += [f"mlx-lm: {text}" for readers, text in limits_of(source.config or {}) if "mlx-lm" in readers]
    else:
        export_model.export_dense(source, out)
    if as_json:
        counts = {"quantized_weights": len(source.weights), "other_tensors": len(source.tensors)}
        print_json({"out": str(out), "to": to.value, **counts, "notes": [*source.notes, *notes]})
        return
    console.print(
        f"{out}: {len(source.weights)} quantized weights, {len(source.tensors)} other tensors, for {to.value}"
    )
    for note in (*source.notes, *notes):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
