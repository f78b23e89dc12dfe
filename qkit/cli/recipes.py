"""`qkit recipes [NAME]`: lists the recipes, or shows one in full."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import qkit
from qkit.cli.completing import recipe_names
from qkit.cli.console import Json, console, errors, print_json, size
from qkit.engines.registry import ALIASES, DIFFERENCES, left_out
from qkit.grid import Grid
from qkit.rules import Recipe, rule_table
from qkit.runs_on import runs_on
from qkit.suggestions import MACHINES, TYPICAL, bits_of, read_machine, suggest

SUMMARY = 110  #: from so many columns on, the table has summaries, too
LEFT_OF_SUMMARY = 76  #: columns for all that is beside them


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A recipe, an alias or a TOML file. Left out: all recipes.",
            autocompletion=recipe_names,
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TEXT", help='Suggest recipes for a machine, its memory and a model: "cuda, 24 GB, 8B".'
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or show one in full, or suggest some for a machine."""
    if name is not None and machine is not None:
        raise typer.BadParameter("--for looks through all recipes: leave NAME out")
    if machine is not None:
        _suggest(machine, as_json=as_json)
        return
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
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("recipe", overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("runs natively in", no_wrap=True)
    wide = console.width >= SUMMARY
    if wide:
        table.add_column("summary", no_wrap=True, overflow="ellipsis", max_width=console.width - LEFT_OF_SUMMARY)
    for recipe in found:
        cells = (recipe.name, f"{bits_of(recipe):.2f}", ", ".join(runs_on(recipe)))
        table.add_row(*cells, *([recipe.summary] if wide else []))
    console.print(table)
    console.print(
        "Bits are stored bits per weight of most layers. qkit itself runs every recipe on CUDA, CPUs and Macs.",
        highlight=False,
    )
    console.print("aliases: " + ", ".join(f"{alias} = {target}" for alias, target in ALIASES.items()), highlight=False)


def _suggest(text: str, *, as_json: bool) -> None:
    asked = read_machine(text)
    found = suggest(asked)
    if as_json:
        print_json({"for": asdict(asked), "recipes": [asdict(one) for one in found]})
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("recipe", overflow="fold")
    for heading in ("bits", "weights, about", "left of the memory"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(one.recipe, f"{one.bits:.2f}", size(one.nbytes), size(one.left))
    console.print(table)
    console.print(
        f"For {MACHINES[asked.name]}, most bits first: the first of them loses least, the last leaves most room. Sizes assume a "
        f"vocabulary of 128,000; `qkit plan MODEL -r {found[0].recipe}` counts every byte.",
        highlight=False,
    )


def _show(recipe: Recipe, *, asked_for: str) -> None:
    if asked_for in ALIASES:
        console.print(f"{asked_for} is an alias of {recipe.name}: {DIFFERENCES[asked_for]}", highlight=False)
    console.print(Text.assemble((recipe.name, "bold"), f", version {recipe.version}: {recipe.summary}"))
    table = Table("layers", "kind", "weight", "activation", "bits", title="the first rule that matches wins")
    for rule in recipe.rules:
        weight = str(rule.weight) if rule.weight else "left alone"
        table.add_row(", ".join(rule.match), rule.kind, weight, str(rule.activation or ""), _bits(rule.weight))
    console.print(table)


def _bits(grid: Grid | None) -> str:
    return f"{grid.bits_per_weight(TYPICAL):.2f}" if grid else ""


def _as_table(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "version": recipe.version,
        "summary": recipe.summary,
        "bits_per_weight": bits_of(recipe),
        "runs_natively_in": list(runs_on(recipe)),
        "rules": [rule_table(rule) for rule in recipe.rules],
    }
