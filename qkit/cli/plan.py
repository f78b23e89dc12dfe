"""`qkit plan MODEL --recipe R`: the output of `qkit quantize`, to the byte, before any work."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import qkit
from qkit.artifact.config import read_config
from qkit.cli.completing import engine_names, recipe_names
from qkit.cli.console import All, Json, console, print_json, read_size, size
from qkit.cli.quantize import CopyCode, Ignore, Jobs, Model, ShardSize, SkipIndivisible, Untie, warn
from qkit.overrides import check_ignored, overridden
from qkit.path_patterns import collapse
from qkit.processes import cores
from qkit.streaming.gguf_plan import GgufPlan, gguf_plan
from qkit.streaming.plan import Plan, Row, make_plan

if TYPE_CHECKING:
    from qkit.training.memory import Memory


def plan(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file. Needed without --budget.",
            autocompletion=recipe_names,
        ),
    ] = None,
    ignore: Ignore = None,
    skip_indivisible: SkipIndivisible = False,
    copy_code: CopyCode = False,
    untie: Untie = False,
    shard_size: ShardSize = "5GB",
    jobs: Jobs = None,
    train: Annotated[
        bool, typer.Option("--train", help="Add the memory of training: full, and adapters of either kind.")
    ] = False,
    batch: Annotated[int, typer.Option(help="With --train: sequences in a micro-batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a sequence, with --train or --budget.")] = 512,
    dtype: Annotated[str, typer.Option(help="With --train: the type of the master weights.")] = "float32",
    optimizer: Annotated[
        str, typer.Option(help="With --train: adamw, adam, lion, muon, momentum or sgd; qkit train has adamw.")
    ] = "adamw",
    rank: Annotated[int, typer.Option(help="With --train: the rank of adapters.")] = 8,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --train: recompute activations.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="The engine. With --train: torchao or mlx.", autocompletion=engine_names)
    ] = "torchao",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Print a recipe that gives each layer one of --grids: 3.5bpw, bits per quantized weight, or 8GB in all.",
        ),
    ] = None,
    grids: Annotated[str, typer.Option("--grids", help="With --budget: recipes to choose from, with commas.")] = "",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A text file, or a shell pattern in quotes. Repeat for more. With --budget."),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", help="With --budget: statistics of qkit calibrate. Else it gathers its own."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --budget: measure each layer's KL divergence, and estimate nothing.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="With --budget: the most windows of text.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="With --budget: of the labels that the model draws.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="The device of the engine: with --budget by default cpu, with --train cuda.")
    ] = None,
    all_rows: All = False,
    as_json: Json = False,
) -> None:
    """List a model's tensors with their grids under a recipe, and the output size. Reads headers only."""
    if budget is not None:
        from qkit.cli.budget import print_budget  # here, so that other commands start fast

        where: dict[str, Any] = {"backend": backend, "device": device or "cpu"}
        how: dict[str, Any] = {"exact": exact, "length": length, "windows": windows, "seed": seed}
        print_budget(model, budget=budget, grids=grids, data=data or [], stats=stats, **how, **where)
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe with --recipe, or a budget with --budget")
    chosen = overridden(qkit.recipe(recipe), ignore=ignore or (), skip_indivisible=skip_indivisible)
    made = make_plan(model, chosen, shard_bytes=read_size(shard_size), copy_code=copy_code, untie=untie)
    check_ignored(ignore or (), [row.path for row in made.rows if row.path])
    peak = made.peak_memory(jobs or cores())
    config = read_config(made.folder) or {}
    as_gguf = gguf_plan(made, config)
    memory = []
    if train:
        from qkit.training.memory import training_memory  # here, so that other commands start fast

        options: dict[str, Any] = {"dtype": dtype, "optimizer": optimizer, "rank": rank, "engine": backend}
        options["device"] = device or "cuda"
        memory = training_memory(made, config, batch=batch, length=length, recompute=gradient_checkpointing, **options)
    if as_json:
        told = {"training_memory": [{**asdict(one), "total": one.total} for one in memory]} if train else {}
        print_json(_as_table(made, peak, as_gguf) | told)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("tensor", "count", "stored", "shape", "becomes", "bytes"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("count", "bytes") else "left")
    for name, count, row in _each(made) if all_rows else _by_pattern(made):
        shape = "x".join(map(str, row.stored.slot.shape))
        nbytes = count * sum(part.nbytes for part in row.slots)
        table.add_row(name, f"{count:,}", row.stored.slot.dtype, shape, _becomes(row), f"{nbytes:,}")
    console.print(table)
    if made.tied:
        console.print(f"{made.tied} is also the output head", highlight=False)
    for name in made.left_behind:
        console.print(f"not copied: {name}", highlight=False)
    warn(made)
    if as_gguf:
        console.print(str(as_gguf), highlight=False)
    console.print(
        f"{made.output_bytes:,} bytes in {len(made.layout.sizes)} weights file(s), {made.bits_per_weight:.2f} bits per weight, "
        f"about {size(peak)} of memory at most",
        highlight=False,
    )
    if train:
        console.print(_memory(memory, f"{batch} x {length} tokens, {dtype}, {optimizer}"))


def _memory(memory: "list[Memory]", setting: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"memory of training, estimated: {setting}")
    table.add_column("way")
    for heading in ("weights", "gradients", "optimizer", "quantized values", "activations", "together"):
        table.add_column(heading, justify="right")
    for one in memory:
        parts = (one.weights, one.gradients, one.optimizer, one.values, one.activations, one.total)
        table.add_row(one.way, *map(size, parts))
    return table


def _each(made: Plan) -> Iterator[tuple[str, int, Row]]:
    return ((row.stored.slot.name, 1, row) for row in made.rows)


def _by_pattern(made: Plan) -> Iterator[tuple[str, int, Row]]:
    """Patterns of the names of tensors that are alike: how many tensors each has, and the first of them all."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in made.rows:
        alike.setdefault((row.stored.slot.dtype, row.stored.slot.shape, _becomes(row)), []).append(row)
    for rows in alike.values():
        for pattern, count in collapse(row.stored.slot.name for row in rows).items():
            yield pattern, count, rows[0]


def _becomes(row: Row) -> str:
    if not row.slots:
        return f"left out: {row.reason}"
    return str(row.rule.weight) if row.rule else f"as it is: {row.reason}"


def _as_table(made: Plan, peak: int, as_gguf: GgufPlan | None) -> dict[str, Any]:
    return {
        "output_bytes": made.output_bytes,
        "bits_per_weight": made.bits_per_weight,
        "peak_memory_bytes": peak,
        "tied_head": made.tied or None,
        "files": dict(made.layout.sizes),
        "not_copied": list(made.left_behind),
        "warnings": [str(one) for one in made.caveats],
        "gguf": asdict(as_gguf) if as_gguf else None,
        "tensors": [
            {
                "name": row.stored.slot.name,
                "file": row.stored.file.name,
                "dtype": row.stored.slot.dtype,
                "shape": list(row.stored.slot.shape),
                "weight": str(row.rule.weight) if row.rule else None,
                "activation": str(row.rule.activation) if row.rule and row.rule.activation else None,
                "left_alone": row.reason or None,
                "becomes": [
                    {"name": slot.name, "dtype": slot.dtype, "shape": list(slot.shape), "bytes": slot.nbytes}
                    for slot in row.slots
                ],
            }
            for row in made.rows
        ],
    }
