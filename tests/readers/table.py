"""The table of docs/readers.md, from results.json: recipes by readers, the largest difference over the models."""

import json
from collections.abc import Iterable
from pathlib import Path

from recipes import READERS, RECIPES

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
BEGIN, END = "<!-- rows of tests/readers/run.py -->\n", "<!-- end of rows -->\n"


def table() -> str:
    """The rows as Markdown. A cell is the largest difference, or a dash where a reader does not open the recipe's directory."""
    found: dict[tuple[str, str], list[str]] = {}
    for _, recipe, reader, cell in json.loads(RESULTS.read_text()):
        found.setdefault((recipe, reader), []).append(cell)
    lines = [["recipe", *READERS], ["---"] * (1 + len(READERS))]
    lines += [[recipe, *(_cell(found.get((recipe, reader), [])) for reader in READERS)] for recipe in RECIPES]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write() -> None:
    """Puts the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


def _cell(cells: Iterable[str]) -> str:
    cells = list(cells)
    said = sorted({cell for cell in cells if not cell[0].isdigit()})
    if said:
        return "; ".join(said)
    return f"{max(map(float, cells)):.0e}" if cells else "not written"
