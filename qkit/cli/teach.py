"""`qkit teach MODEL FILE --data FILES`: writes a teacher's logits once, for many runs. The work is in `qkit.training`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qkit.cli.console import Json, console, errors, print_json
from qkit.cli.eval import Device, Engine


def teach(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="The teacher's directory; or a run file, run.toml, that names it in distillation.teacher.",
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of logits, written whole or not at all.")],
    data: Annotated[
        list[str] | None, typer.Option(help="A text file, or a shell pattern in quotes. Repeat for more.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="The held-out text of the later runs. Left out: they hold out some of the data."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many logits to store for each position, in 8 bytes each.")] = 64,
    length: Annotated[int | None, typer.Option(help="Tokens in a sequence, as in the later runs [512].")] = None,
    backend: Engine = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a teacher's largest logits on a text, for `qkit train --set distillation.teacher=FILE` on any engine."""
    from qkit.training import read_run, run_from_table, teach  # here, so that other commands start fast

    given = {"data": data, "held_out": held_out, "length": length, "backend": backend, "device": device}
    table = {"model": str(model), "out": str(file), "distillation": {"teacher": str(model)}}
    table = read_run(model) if model.suffix == ".toml" else table
    run = run_from_table(table | {name: value for name, value in given.items() if value is not None})
    columns = (BarColumn(), TextColumn("{task.completed} of {task.total} sequences"), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal)
    with bar:
        task = bar.add_task("", total=None)
        teach(run, file, top=top, tick=lambda done, of: bar.update(task, completed=done, total=of))
    if as_json:
        print_json({"file": str(file), "top": top, "length": run.length, "bytes": file.stat().st_size})
        return
    console.print(f"{file}: the {top} largest logits at every position, for sequences of {run.length}", highlight=False)
