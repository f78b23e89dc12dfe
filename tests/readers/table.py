"""The table of docs/evidence/readers.md, from results.json: recipes by readers, the largest difference over the models."""

from collections.abc import Collection, Iterable
from pathlib import Path

import records

from recipes import MODELS, READERS, RECIPES, tried

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "readers.md"
BEGIN, END = "<!-- rows of tests/readers/run.py -->\n", "<!-- end of rows -->\n"


def table() -> str:
    """The rows as Markdown, the rows that were not run, and versions. A cell has the largest difference, and refusals."""
    rows = records.load()
    found: dict[tuple[str, str], list[str]] = {}
    for (_, recipe, reader), row in rows.items():
        found.setdefault((recipe, reader), []).append(records.verdict(row))
    lines = [["recipe", *READERS], ["---"] * (1 + len(READERS))]
    lines += [[recipe, *(_cell(found.get((recipe, reader), [])) for reader in READERS)] for recipe in RECIPES]
    versions = "\n".join(sorted({f"- {row['versions']}" for row in rows.values()}))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + _not_run(rows) + f"\nVersions:\n\n{versions}\n"


def write() -> None:
    """Puts the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


def _not_run(done: Collection[tuple[str, ...]]) -> str:
    """A sentence for each model and reader with rows that have no result yet; empty where there are none."""
    lines = []
    for model in MODELS:
        for reader, about in READERS.items():
            own = [recipe for recipe in about.recipes if tried(model, recipe)]
            missing = [recipe for recipe in own if (model, recipe, reader) not in done]
            if missing:
                which = "" if len(missing) == len(own) else f" under {', '.join(missing)}"
                lines.append(f"Not run: {model} in {reader}{which}.\n")
    return "\n" + "\n".join(lines) if lines else ""


def _cell(cells: Iterable[str]) -> str:
    cells = list(cells)
    numbers = [float(cell) for cell in cells if cell[0].isdigit()]
    said = sorted({cell for cell in cells if not cell[0].isdigit()})
    return "; ".join([*([f"{max(numbers):.0e}"] if numbers else []), *said])
