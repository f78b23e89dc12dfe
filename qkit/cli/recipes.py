"""`qkit recipes [NAME]`: lists the recipes, or shows one in full."""

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import qkit
from qkit.cli.console import Json, console, errors, print_json
from qkit.engines.registry import ALIASES, DIFFERENCES, left_out
from qkit.grid import Grid
from qkit.rules import Recipe, rule_table

NAMES = 80  #: columns for names and grids; the summary gets the rest
TYPICAL = (4096, 4096)  #: shape of the weight for which the table shows bits per weight


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe, an alias or a TOML file. Left out: all recipes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or show one in full."""
    if name is not None:
        recipe = qkit.recipe(name)
        if as_json:
            print_json(_as_table(recipe))
        else:
            _show(recipe, asked_for=name)
        return
    found = [qkit.recipe(known) for known in qkit.recipes()]
    for who, reason in left_out().items():
        errors.print(f"left out: {who}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json([_as_table(recipe) for recipe in found])
        return
    rows = [(recipe.name, *_main_rule(recipe), recipe.summary) for recipe in found]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(("recipe", "weight", "activation", "bits")):
        table.add_column(heading, min_width=max(len(row[i]) for row in rows), no_wrap=True)
    table.add_column("summary", no_wrap=True, overflow="ellipsis", max_width=max(console.width - NAMES, 1))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("aliases: " + ", ".join(f"{alias} = {target}" for alias, target in ALIASES.items()), highlight=False)


def _show(recipe: Recipe, *, asked_for: str) -> None:
    if asked_for in ALIASES:
        console.print(f"{asked_for} is an alias of {recipe.name}: {DIFFERENCES[asked_for]}", highlight=False)
    console.print(Text.assemble((recipe.name, "bold"), f", version {recipe.version}: {recipe.summary}"))
    table = Table("layers", "kind", "weight", "activation", "bits", title="the first rule that matches wins")
    for rule in recipe.rules:
        weight = str(rule.weight) if rule.weight else "left alone"
        table.add_row(", ".join(rule.match), rule.kind, weight, str(rule.activation or ""), _bits(rule.weight))
    console.print(table)


def _main_rule(recipe: Recipe) -> tuple[str, str, str]:
    """Weight, activation and bits of the last rule that quantizes, which most layers follow."""
    rule = [rule for rule in recipe.rules if rule.weight][-1]
    return str(rule.weight), str(rule.activation or ""), _bits(rule.weight)


def _bits(grid: Grid | None) -> str:
    return f"{grid.bits_per_weight(TYPICAL):.2f}" if grid else ""


def _as_table(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "version": recipe.version,
        "summary": recipe.summary,
        "rules": [rule_table(rule) for rule in recipe.rules],
    }
