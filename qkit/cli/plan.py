"""`qkit plan MODEL --recipe R`: the output of `qkit quantize`, to the byte, before any work."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import qkit
from qkit.cli.console import Json, console, print_json, read_size, size
from qkit.cli.quantize import CopyCode, Model, RecipeName, ShardSize, warn
from qkit.streaming.carry_out import WORKERS
from qkit.streaming.plan import Plan, make_plan


def plan(
    model: Model, recipe: RecipeName, copy_code: CopyCode = False, shard_size: ShardSize = "5GB", as_json: Json = False
) -> None:
    """List every tensor of a model's directory with its grid under a recipe, and the output size. Reads headers only."""
    made = make_plan(model, qkit.recipe(recipe), shard_bytes=read_size(shard_size), copy_code=copy_code)
    peak = made.peak_memory(WORKERS)
    if as_json:
        print_json(_as_table(made, peak))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("tensor", "stored", "shape", "becomes", "bytes"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "bytes" else "left")
    for row in made.rows:
        slot, shape = row.stored.slot, "x".join(map(str, row.stored.slot.shape))
        becomes = str(row.rule.weight) if row.rule else f"as it is: {row.reason}"
        table.add_row(slot.name, slot.dtype, shape, becomes, f"{sum(part.nbytes for part in row.slots):,}")
    console.print(table)
    if made.tied:
        console.print(f"{made.tied} is also the output head", highlight=False)
    for name in made.left_behind:
        console.print(f"not copied: {name}", highlight=False)
    warn(made)
    console.print(
        f"{made.output_bytes:,} bytes in {len(made.layout.sizes)} weights file(s), {made.bits_per_weight:.2f} bits per weight, "
        f"about {size(peak)} of memory at most",
        highlight=False,
    )


def _as_table(made: Plan, peak: int) -> dict[str, Any]:
    return {
        "output_bytes": made.output_bytes,
        "bits_per_weight": made.bits_per_weight,
        "peak_memory_bytes": peak,
        "tied_head": made.tied or None,
        "files": dict(made.layout.sizes),
        "not_copied": list(made.left_behind),
        "warnings": [str(one) for one in made.caveats],
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
