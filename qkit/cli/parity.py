"""`qkit parity`: compares every engine with the reference, and shows a matrix of mismatches."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import qkit
from qkit.cli.completing import engine_names, recipe_names
from qkit.cli.console import Json, Type, console, errors, print_json
from qkit.engines.protocol import Arrays
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.rules import Recipe

if TYPE_CHECKING:
    from qkit.testing.parity import Parity

Work = tuple[Arrays, DType, bool]  #: engine, type, compiled
Rows = Mapping[str, list[Grid]]  #: name of a row of the matrix -> its grids
MISMATCH = 1


def parity(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE", help="Recipes to compare on. Left out: all of them.", autocompletion=recipe_names
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backends to compare. Left out: all that are ready.", autocompletion=engine_names),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="The device, such as cpu or cuda. Left out: the CPU, or MLX's default device."),
    ] = None,
    dtype: Annotated[list[Type] | None, typer.Option(help="Types to compare in. Left out: all three.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compiled/--no-compiled", help="Only compiled, or only eager. Left out: eager."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every grid, eager and compiled, and layers of every recipe.")
    ] = False,
    size: Annotated[int, typer.Option(min=1, help="Random numbers per grid, besides the adversarial ones.")] = 16384,
    as_json: Json = False,
) -> None:
    """Count the codes, scales and values in which backends differ from the reference; exit 1 if any does."""
    from qkit.cli.probing import placed, probe_all, show_probes  # here, so that other commands start fast

    rows = _every_row() if every and not recipe else _rows(recipe or qkit.recipes())
    names = backend or [status.name for status in qkit.backends() if status.ready]
    engines = [qkit.backend(name) for name in names]
    if device is not None:
        engines = [engine.on(device) for engine in engines] if backend else placed(engines, device)
    modes = [False, True] if every and compiled is None else [bool(compiled)]
    dtypes = [name for name in DTYPES if name in (dtype or DTYPES)]
    work = _work(engines, dtypes, modes)
    if not work:
        raise typer.BadParameter("numpy has no compiler, so nothing is left to compare", param_hint="--compiled")
    results = _run(work, rows, size)
    probed = map(qkit.recipe, recipe or qkit.recipes()) if every else []
    probes = probe_all(engines, probed, dtypes=dtypes, device=None)
    if as_json:
        grids = [asdict(result) | {"grid": str(result.grid), "exact": result.exact} for result in results]
        print_json([*grids, *(asdict(one) | {"exact": one.exact} for one in probes)])
    else:
        _show(results, rows)
        if probes:
            show_probes(probes)
    if not all([*(result.exact for result in results), *(one.exact for one in probes)]):
        raise typer.Exit(MISMATCH)


def _rows(names: Iterable[str]) -> Rows:
    return {recipe.name: _grids(recipe) for recipe in map(qkit.recipe, names)}


def _grids(recipe: Recipe) -> list[Grid]:
    grids = [grid for rule in recipe.rules for grid in (rule.weight, *rule.slots.values()) if grid]
    return list(dict.fromkeys(grids))


def _every_row() -> Rows:
    from qkit.testing.hard_tensors import all_grids  # here, so that other commands start fast

    rows: dict[str, list[Grid]] = {}
    for grid in all_grids():
        rows.setdefault(f"{grid.element} {grid.scale}", []).append(grid)
    return rows


def _work(engines: list[Arrays], dtypes: list[DType], modes: list[bool]) -> list[Work]:
    return [
        (engine, dtype, compiled)
        for engine in engines
        for compiled in modes
        for dtype in dtypes
        if not (compiled and engine.name == "numpy")  # NumPy compiles nothing: the results would be the eager ones
    ]


def _run(work: list[Work], rows: Rows, size: int) -> "list[Parity]":
    """Each distinct grid once per engine, type and mode, with progress on standard error."""
    from qkit.testing.parity import compare_many  # here, so that other commands start fast

    grids = list(dict.fromkeys(grid for grids in rows.values() for grid in grids))
    results = []
    description = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), description, MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(work) * len(grids))
        for engine, dtype, compiled in work:
            progress.update(task, description=f"{_mode(engine.name, compiled)} {dtype}")
            for result in compare_many(engine, grids, dtype=dtype, compiled=compiled, size=size):
                results.append(result)
                progress.advance(task)
    return results


def _show(results: "list[Parity]", rows: Rows) -> None:
    columns = list(dict.fromkeys(_mode(result.backend, result.compiled) for result in results))
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    table = Table("grid", "dtype", *columns, title="mismatching codes/scales/values, out of how many numbers")
    for name, grids in rows.items():
        for dtype in dtypes:
            mine = [result for result in results if result.grid in grids and result.dtype == dtype]
            cells = [
                _cell([result for result in mine if _mode(result.backend, result.compiled) == column])
                for column in columns
            ]
            table.add_row(name, dtype, *cells)
    console.print(table)
    for reason in dict.fromkeys(
        f"{result.backend} {result.grid}: {result.error}" for result in results if result.error
    ):
        console.print(reason, highlight=False)
    compared = sum(result.compared for result in results)
    wrong = sum(result.codes + result.scales + result.values for result in results)
    failed = sum(bool(result.error) for result in results)
    console.print(f"{wrong:,} mismatches in {compared:,} comparisons" + (f", {failed} not run" if failed else ""))


def _cell(results: "list[Parity]") -> Text:
    if any(result.error for result in results):
        return Text("failed", "red")
    counts = [sum(getattr(result, name) for result in results) for name in ("codes", "scales", "values")]
    color = "red" if any(counts) else "green"
    compared = _short(sum(result.compared for result in results))
    return Text.assemble(("/".join(map(str, counts)), color), " ", (compared, "dim"))


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def _mode(backend: str, compiled: bool) -> str:
    return f"{backend} compiled" if compiled else backend
