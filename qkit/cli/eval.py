"""`qkit eval DIR... --data FILES`: the losses of models on the same tokens. The work is in `qkit.evaluation`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import qkit
from qkit.cli.completing import engine_names
from qkit.cli.console import Json, console, print_json
from qkit.cli.opened import all_opened, opened
from qkit.cli.progress import counting
from qkit.engines.abilities import require
from qkit.engines.protocol import Builds

if TYPE_CHECKING:
    from qkit.evaluation import Evaluation

Data = Annotated[list[str], typer.Option("--data", help="A text file, or a shell pattern in quotes. Repeat for more.")]
Engine = Annotated[
    str | None, typer.Option(help="The engine. Left out: the first that is ready.", autocompletion=engine_names)
]
Device = Annotated[str | None, typer.Option(help="The device of the engine, such as cpu or cuda.")]
Length = Annotated[int, typer.Option(help="Tokens predicted in one window.")]
Windows = Annotated[int | None, typer.Option(help="The most windows, at even distances. Left out: the whole text.")]


def eval_(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR", help="Model directories, float or quantized, or GGUF files.", callback=all_opened
        ),
    ],
    data: Data,
    teacher: Annotated[
        Path | None, typer.Option(help="A directory to measure the distance from.", callback=opened)
    ] = None,
    backend: Engine = None,
    device: Device = None,
    length: Length = 256,
    windows: Windows = None,
    as_json: Json = False,
) -> None:
    """Measure models on a text: loss, perplexity, and KL divergence from a teacher, on identical tokens."""
    from qkit.evaluation import consecutive, evaluate, open_model, read_alike  # here, so that other commands start fast

    engine = require(qkit.backend(backend), Builds)
    engine = engine.on(device) if device else engine
    text = read_alike([*directories, *([teacher] if teacher else [])], data)
    rows = consecutive(text.tokens, length=length, windows=windows)
    tokens_per_byte = text.tokens.size / text.nbytes
    reference = open_model(engine, teacher) if teacher else None
    found = {}
    with counting(len(rows) * len(directories), "windows") as tick:
        for directory in directories:
            tick(str(directory), 0)
            model, step = open_model(engine, directory), partial(tick, str(directory))
            found[directory] = evaluate(engine, model, rows, teacher=reference, tick=step)
    if as_json:
        print_json(
            {
                "backend": engine.name,
                "data": data,
                "teacher": str(teacher) if teacher else None,
                "windows": len(rows),
                "length": length,
                "models": [{"directory": str(where)} | _numbers(one, tokens_per_byte) for where, one in found.items()],
            }
        )
    else:
        console.print(_table(found, tokens_per_byte, teacher))


def _numbers(found: "Evaluation", tokens_per_byte: float) -> dict[str, Any]:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte(tokens_per_byte),
        "tokens": found.tokens,
        "kl": None if found.kl is None else float(found.kl.mean()),
        "agreement": None if found.agreement is None else float(found.agreement.mean()),
    }


def _table(found: "dict[Path, Evaluation]", tokens_per_byte: float, teacher: Path | None) -> Table:
    columns = ["model", "nats per token", "perplexity", "bits per byte", "tokens"]
    table = Table(*columns, *([f"KL from {teacher}", "same likeliest token"] if teacher else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for directory, one in found.items():
        numbers = _numbers(one, tokens_per_byte)
        cells = [f"{numbers['loss']:.4f}", f"{numbers['perplexity']:.3f}", f"{numbers['bits_per_byte']:.4f}"]
        cells.append(f"{one.tokens:,}")
        if teacher:
            cells += [f"{numbers['kl']:.5f}", f"{numbers['agreement']:.1%}"]
        table.add_row(str(directory), *cells)
    return table
