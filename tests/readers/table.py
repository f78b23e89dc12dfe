"""The table of docs/readers.md, from results.json: recipes by readers, the largest difference over the models."""

import json
from collections.abc import Iterable
from pathlib import Path

from recipes import READERS, RECIPES

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
BEGIN, END = "<!-- rows of tests/readers/run.py -->\n", "<!-- end of rows -->\n"


def table() -> str:
    """The rows as Markdown. A cell has the largest difference and the reasons of refusals; it is empty where not tried."""
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
    numbers = [float(cell) for cell in cells if cell[0].isdigit()]
    said = sorted({cell for cell in cells if not cell[0].isdigit()})
    return "; ".join([*([f"{max(numbers):.0e}"] if numbers else []), *said])
