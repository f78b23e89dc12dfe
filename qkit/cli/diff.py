"""`qkit diff A B`: the differences of two model directories, tensor by tensor. The work is in `qkit.exchange`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from qkit.cli.console import Json, console, print_json

if TYPE_CHECKING:
    from qkit.exchange.diff import Difference

DIFFERENT = 1


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model directory, in any layout that qkit reads.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another model directory.")],
    as_json: Json = False,
) -> None:
    """Compare two models, code by code and scale by scale. Exit code 0: equal; 1: different."""
    from qkit.exchange.diff import compare  # here, so that other commands start fast
    from qkit.exchange.import_model import read_model

    found = list(compare(read_model(first), read_model(second)))
    different = [row for row in found if not row.equal]
    totals = {name: sum(getattr(row, name) for row in found) for name in ("codes", "scales", "values")}
    if as_json:
        tensors = [{**asdict(row), "equal": row.equal} for row in found]
        print_json({"equal": not different, **totals, "tensors": tensors})
    else:
        _show(found, different, totals)
    if different:
        raise typer.Exit(DIFFERENT)


def _show(found: "list[Difference]", different: "list[Difference]", totals: dict[str, int]) -> None:
    if different:
        table = Table("tensor", "compared", "codes", "scales", "values", "of", "")
        for row in different:
            counts = (f"{count:,}" if count else "" for count in (row.codes, row.scales, row.values))
            table.add_row(row.name, row.compared, *counts, f"{row.numbers:,}", row.detail)
        console.print(table)
    numbers = sum(row.numbers for row in found)
    by_values = [row for row in found if row.compared == "values" and row.detail]
    counted = ", ".join(f"{count:,} {name}" for name, count in totals.items())
    console.print(f"{len(different):,} of {len(found):,} tensors differ: {counted}, of {numbers:,} numbers")
    if by_values:
        console.print(f"{len(by_values):,} compared by their values, since only one side holds them on that grid")
