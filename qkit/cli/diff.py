"""`qkit diff A B`: the differences of two model directories, tensor by tensor. The work is in `qkit.exchange`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from qkit.cli.console import NAME, Json, console, errors, print_json
from qkit.storage.destination import check_replaced_file

if TYPE_CHECKING:
    from qkit.exchange.diff import Difference

DIFFERENT = 1


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model directory, in any layout that qkit reads.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another model directory.")],
    picture: Annotated[
        Path | None, typer.Option(help="A PNG of the errors of each layer of B from A; needs matplotlib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two models, code by code, with the errors of each layer. Exit code 0: equal; 1: different.

    Errors are those of B's values from A's, so name the float model first: MSE, SQNR, cosine and the largest one.
    """
    from qkit.exchange.diff import compare  # here, so that other commands start fast
    from qkit.exchange.import_model import read_model

    if picture:
        check_replaced_file(picture)
    found = list(compare(read_model(first), read_model(second)))
    different = [row for row in found if not row.equal]
    totals = {name: sum(getattr(row, name) for row in found) for name in ("codes", "scales", "values")}
    if as_json:
        tensors = [{**asdict(row), "equal": row.equal} for row in found]
        print_json({"equal": not different, **totals, "tensors": tensors})
    else:
        _show(found, different, totals)
    if picture:
        from qkit.exchange.picture import draw

        draw(found, picture, title=f"{second.name} from {first.name}: the error of each layer")
        errors.print(f"{picture}: the errors of each layer", highlight=False, soft_wrap=True)
    if different:
        raise typer.Exit(DIFFERENT)


def _show(found: "list[Difference]", different: "list[Difference]", totals: dict[str, int]) -> None:
    if different:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("tensor", overflow="fold", min_width=NAME)
        table.add_column("differ", justify="right")
        table.add_column("of", justify="right")
        table.add_column("compared by", overflow="fold")
        for row in different:
            counts = {"codes": row.codes, "scales": row.scales, "values": row.values}
            differ = "\n".join(f"{count:,} {name}" for name, count in counts.items() if count)
            how = f"{row.compared}: {row.detail}" if row.compared and row.detail else row.compared or row.detail
            table.add_row(row.name.removesuffix(".weight"), differ, f"{row.numbers:,}", how)
        console.print(table)
        if any(row.error for row in different):
            console.print(_error_table(different))
    numbers = sum(row.numbers for row in found)
    by_values = [row for row in found if row.compared == "values" and row.detail]
    counted = ", ".join(f"{count:,} {name}" for name, count in totals.items())
    console.print(f"{len(different):,} of {len(found):,} tensors differ: {counted}, of {numbers:,} numbers")
    if by_values:
        console.print(f"{len(by_values):,} compared by their values, since only one side holds them on that grid")


def _error_table(different: "list[Difference]") -> Table:
    """The errors of B from A, weight by weight."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=NAME)
    for heading in ("MSE", "SQNR, dB", "cosine", "largest"):
        table.add_column(heading, justify="right")
    for row in different:
        if one := row.error:
            decibels = "infinite" if one.sqnr is None else f"{one.sqnr:.2f}"
            cells = (f"{one.mse:.3e}", decibels, f"{one.cosine:.6f}", f"{one.largest:.3e}")
            table.add_row(row.name.removesuffix(".weight"), *cells)
    return table
