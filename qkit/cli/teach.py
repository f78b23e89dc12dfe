"""`qkit teach MODEL FILE --data FILES`: a teacher's logits, written down once for many runs. The work is in `qkit.training`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qkit.cli.console import console, errors
from qkit.cli.eval import Device, Engine


def teach(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="The teacher's directory; or a run file, run.toml, whose distillation.teacher it is.",
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: made whole, or not at all.")],
    data: Annotated[
        list[str] | None, typer.Option(help="A text, or a shell pattern in quotes; give it again for more.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="As in the runs to come, which train on less of the data if it is left out."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many logits to keep of each place: 8 bytes for each.")] = 64,
    length: Annotated[int | None, typer.Option(help="Tokens in a sequence, as in the runs to come [512].")] = None,
    backend: Engine = None,
    device: Device = None,
) -> None:
    """Write a teacher's largest logits on a text, for `qkit train ... --set distillation.teacher=FILE` on any engine."""
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
    console.print(f"{file}: the {top} largest logits at every place, for sequences of {run.length}", highlight=False)
