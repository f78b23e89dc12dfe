"""The table of docs/readers.md, from results.json: recipes by readers, the largest difference over the models."""

import json
from collections.abc import Iterable
from pathlib import Path

from recipes import READERS, RECIPES

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
BEGIN, END = "<!-- rows of tests/readers/run.py -->\n", "<!-- end of rows -->\n"


def table() -> str:
    """The rows as Markdown. A cell is the largest difference, and the reasons of refusals; empty where it was not tried."""
    found: dict[tuple[str, str], list[str]] = {}
    for _, recipe, reader, cell in json.loads(RESULTS.read_text()):
        found.setdefault((recipe, reader), []).append(cell)
    run = [reader for reader in READERS if any(key[1] == reader for key in found)]
    lines = [["recipe", *run], ["---"] * (1 + len(run))]
    lines += [[recipe, *(_cell(found.get((recipe, reader), []), reader) for reader in run)] for recipe in RECIPES]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write() -> None:
    """Puts the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


def _cell(cells: Iterable[str], reader: str) -> str:
    cells = list(cells)
    if not cells:
        return "not exported" if READERS[reader].layout == "mlx" else ""
    numbers = [float(cell) for cell in cells if cell[0].isdigit()]
    said = sorted({cell for cell in cells if not cell[0].isdigit()})
    return "; ".join([*([f"{max(numbers):.0e}"] if numbers else []), *said])
