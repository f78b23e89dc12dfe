"""`qkit quantize MODEL OUT --recipe R`: quantizes a directory, and builds no model."""

import gc
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

import qkit
from qkit.cli.console import console, errors, read_size, size
from qkit.storage.destination import Destination, check_directory, existing_parent
from qkit.streaming.carry_out import WORKERS, check_apart, quantize_directory
from qkit.streaming.plan import Plan, make_plan

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face directory: safetensors and a config.json.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A recipe, an alias or a TOML file.")]
CopyCode = Annotated[
    bool, typer.Option("--copy-code", help="Copy the directory's Python files too. qkit never runs them.")
]
ShardSize = Annotated[str, typer.Option(help="The most bytes of tensors in one file, such as 5GB or 800MB.")]


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized directory, written whole or not at all.")],
    recipe: RecipeName,
    backend: Annotated[str, typer.Option(help="The engine. Every engine makes the same codes.")] = "numpy",
    device: Annotated[str, typer.Option(help="The device of the engine, such as cpu or cuda.")] = "cpu",
    copy_code: CopyCode = False,
    shard_size: ShardSize = "5GB",
) -> None:
    """Quantize a model's directory, tensor by tensor; interrupted, the same command goes on where it was."""
    check_apart(out, model)
    place = check_directory(out)
    engine = qkit.backend(backend).on(device)
    plan = make_plan(model, qkit.recipe(recipe), shard_bytes=read_size(shard_size), copy_code=copy_code)
    _check_room(plan, place)
    warn(plan)
    gc.freeze()  # a collection in a forked worker would copy the pages of today's objects: a tenth of the time
    workers = WORKERS if engine.name == "numpy" else 1
    if sys.stderr.isatty():
        with _progress() as bar:
            task = bar.add_task("", total=sum(row.stored.slot.nbytes for row in plan.rows))
            quantize_directory(
                plan,
                out,
                engine=engine,
                workers=workers,
                tick=lambda name, done: bar.update(task, advance=done, description=name, refresh=True),
            )
    else:
        quantize_directory(plan, out, engine=engine, workers=workers, tick=lambda name, done: None)
    _report(plan, out)


def warn(plan: Plan) -> None:
    """Prints the readers that will not open the output, or only in one way, to standard error."""
    for one in plan.caveats:
        errors.print(f"warning: {one}", highlight=False, markup=False, soft_wrap=True)


def _check_room(plan: Plan, place: Destination) -> None:
    """Refuses, before any work, an output that the disk has no room for."""
    out, aside = place.requested, place.aside
    reusable = sum(entry.stat().st_blocks * 512 for entry in aside.iterdir()) if aside.exists() else 0
    home = place.path if place.mounted else existing_parent(place.path)
    free = shutil.disk_usage(home).free + reusable
    if plan.output_bytes > free:
        raise qkit.PlanError(
            f"{out} needs {size(plan.output_bytes)}, and {home} has {size(free)} free: make room, or go elsewhere"
        )


def _report(plan: Plan, out: Path) -> None:
    layers = sum(bool(row.rule) for row in plan.rows)
    written = f"{size(plan.output_bytes)}, {plan.bits_per_weight:.2f} bits per weight"
    console.print(f"{out}: {layers} layers quantized, {written}", highlight=False)
    if plan.left_behind:
        errors.print(f"not copied: {', '.join(plan.left_behind)}", highlight=False, soft_wrap=True)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        """MB/s of source read."""
        return Text(f"{(task.speed or 0) / 1e6:.0f} MB/s")


def _progress() -> Progress:
    name = TextColumn("{task.description}", markup=False)
    return Progress(
        BarColumn(), _Speed(), TimeRemainingColumn(), name, console=errors, transient=True, auto_refresh=False
    )  # no thread: workers are forked
