"""The table of recipes and engines that `qkit backends --probe` and `qkit parity --all` show."""

from collections.abc import Iterable
from typing import TypeVar

from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from qkit.cli.console import console, errors
from qkit.engines.abilities import offers
from qkit.engines.protocol import Arrays, Modules
from qkit.errors import BackendError
from qkit.qtensor import DType
from qkit.rules import Recipe
from qkit.testing.probe import Probe, probe, worst

Engine = TypeVar("Engine", bound=Arrays)
COLORS = {"native": "green", "decoded": "yellow", "missing": "red"}


def probe_all(
    engines: Iterable[Arrays], recipes: Iterable[Recipe], *, dtypes: Iterable[DType], device: str | None
) -> list[Probe]:
    """Probes every recipe on every engine that has modules, with progress on standard error."""
    recipes, dtypes = list(recipes), list(dtypes)
    found: list[Probe] = []
    description = TextColumn("{task.description}", markup=False)
    able = [engine for engine in engines if offers(engine, Modules)]
    there = placed(able, device) if device else able  # before the progress begins, so that a refusal is a line alone
    with Progress(SpinnerColumn(), description, console=errors, transient=True) as progress:
        task = progress.add_task("", total=None)
        for engine in there:
            for recipe in recipes:
                progress.update(task, description=f"{engine.name} {recipe.name}")
                for dtype in dtypes:
                    found += probe(engine, recipe, dtype=dtype, device=device or "")
    return found


def placed(engines: Iterable[Engine], device: str) -> list[Engine]:
    """Those of `engines` that work on `device`, there. Names the others on standard error.

    Raises:
        BackendError: none does.
    """
    there, refused = [], []
    for engine in engines:
        try:
            there.append(engine.on(device))
        except BackendError as error:
            refused.append(f"{engine.name}: {error}")
    if not there:
        raise BackendError(f"no engine works on {device!r}: {'; '.join(refused)}")
    for reason in refused:
        errors.print(f"left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    return there


def show_probes(probes: list[Probe]) -> None:
    """Prints a row for each recipe, a column for each engine, and the meaning of the cells below."""
    engines = list(dict.fromkeys(one.backend for one in probes))
    table = Table("recipe", *engines)
    for name in dict.fromkeys(one.recipe for one in probes):
        table.add_row(
            name, *(_cell([one for one in probes if (one.recipe, one.backend) == (name, e)]) for e in engines)
        )
    console.print(table)
    means: dict[tuple[str, str, str], list[str]] = {}
    for one in probes:
        means.setdefault((one.backend, one.outcome, one.detail), []).append(one.recipe)
    for (backend, outcome, detail), names in means.items():
        known = list(dict.fromkeys(names))
        which = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
        console.print(f"{backend} {outcome}: {detail} ({which})", highlight=False)
    wrong = [one for one in probes if one.outcome != "missing" and not one.exact]
    for one in wrong:
        console.print(
            f"{one.backend} {one.recipe} {one.dtype}: {one.codes} of {one.compared} codes and scales differ, outputs by "
            f"{one.difference:.2g} of abs(x) @ abs(w)",
            style="red",
            highlight=False,
        )
    compared = sum(one.compared for one in probes)
    console.print(
        f"{len(probes)} layers prepared and converted: {sum(one.codes for one in probes)} mismatches in {compared:,} codes "
        f"and scales, {len(wrong)} with outputs or codes that differ",
        highlight=False,
    )


def _cell(probes: list[Probe]) -> Text:
    if not probes:
        return Text("")
    outcome = worst(probes)
    wrong = outcome != "missing" and not all(one.exact for one in probes)
    return Text(f"{outcome}, wrong" if wrong else outcome, "red" if wrong else COLORS[outcome])
