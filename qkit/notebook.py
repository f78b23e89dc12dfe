"""Values of qkit as HTML, for notebooks: tables without scripts, in the colors of the page around them."""

from collections.abc import Iterable, Sequence
from html import escape
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkit.coverage_table import Coverage
    from qkit.qtensor import QTensor
    from qkit.rules import Recipe, Rule
    from qkit.testing.parity import Parity

TYPICAL = (4096, 4096)  #: shape of the weight for which the table of a recipe shows bits per weight
CELL = "text-align:left;padding:2px 12px 2px 0"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain text, all of which is escaped."""
    top = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in head)
    lines = ("".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in cells) for cells in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    title = f'<caption style="text-align:left;font-weight:bold">{escape(caption)}</caption>'
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def show_coverage(coverage: "Coverage") -> str:
    """Every layer of a model, its grids and how it runs."""
    rows = (
        (
            row.path,
            "x".join(map(str, row.shape)),
            row.weight,
            row.activation,
            row.output,
            f"{row.bits:.2f}",
            row.state + (f", tied to {row.tied}" if row.tied else ""),
        )
        for row in coverage.rows
    )
    caption = f"{coverage.bits_per_weight:.2f} bits per weight, {coverage.nbytes:,} bytes"
    return table(caption, ("layer", "shape", "weight", "activation", "output", "bits", "state"), rows)


def show_recipe(recipe: "Recipe") -> str:
    """Every rule of a recipe, the first that matches wins."""
    caption = f"{recipe.name}, version {recipe.version}: {recipe.summary}".rstrip(": ")
    head = ("layers", "kind", "weight", "activation", "output", "bits")
    return table(caption, head, map(_rule_cells, recipe.rules))


def _rule_cells(rule: "Rule") -> tuple[str, ...]:
    bits = f"{rule.weight.bits_per_weight(TYPICAL):.2f}" if rule.weight else ""
    grids = (str(rule.weight or "left alone"), str(rule.activation or ""), str(rule.output or ""))
    return (", ".join(rule.match), rule.kind, *grids, bits)


def show_qtensor(q: "QTensor[Any]") -> str:
    """The grid of a quantized tensor, and the shape and type of each of its arrays."""
    bits = q.grid.bits_per_weight(q.shape)
    caption = f"{q.grid}, {q.dtype} [{', '.join(map(str, q.shape))}], {bits:.2f} bits per weight"
    rows = (
        (name, str(array.dtype).rpartition(".")[2], f"[{', '.join(map(str, array.shape))}]", f"{prod(array.shape):,}")
        for name, array in q.parts().items()
    )
    return table(caption, ("part", "type", "shape", "numbers"), rows)


def show_parity(results: "Sequence[Parity]") -> str:
    """A row for each comparison with the reference: how many codes, scales and values differ."""
    rows = (
        (
            str(one.grid),
            one.backend + (" compiled" if one.compiled else ""),
            one.dtype,
            *(f"{count:,}" for count in (one.codes, one.scales, one.values, one.compared)),
            "equal" if one.exact else one.error or "differs",
        )
        for one in results
    )
    exact = sum(one.exact for one in results)
    head = ("grid", "engine", "type", "codes", "scales", "values", "compared", "")
    return table(f"{exact:,} of {len(results):,} comparisons with the reference are equal", head, rows)
