"""Figures and tables of the page as HTML."""

from collections.abc import Sequence
from html import escape

LEGEND = {
    "float": "float",
    "ptq": "quantized without training (PTQ)",
    "longer": "the same, of the float model trained longer",
    "qat": "trained on the grid (QAT)",
    "moved": "trained, deployed on another grid",
}


def figure(
    caption: str,
    unit: str,
    chart: str,
    tones: Sequence[str],
    names: Sequence[str] = (),
    colors: Sequence[str] = (),
) -> str:
    """A chart with its caption, and a legend: of the `tones` of models, or of `names` in `colors`."""
    known = {LEGEND[tone]: tone for tone in tones} or dict(zip(names, colors, strict=False))
    items = "".join(
        f'<li><svg viewBox="0 0 11 11" aria-hidden="true"><rect class="{color}" width="11" height="11" rx="2"/></svg>'
        f"{escape(name)}</li>"
        for name, color in known.items()
    )
    return (
        f"<figure><figcaption>{escape(caption)}<span>{escape(unit)}</span></figcaption>{chart}"
        f'<ul class="legend">{items}</ul></figure>'
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table. Escapes the first cell of each row, a name; the others are markup of this module, or numbers."""
    tops = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{_cells(head[1:], row[1:])}</tr>' for row in rows)
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{tops}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(head: Sequence[str], cells: Sequence[str]) -> str:
    """Cells that name their column, since a narrow screen shows them one below the other."""
    return "".join(
        f'<td data-column="{escape(name)}"><span>{cell}</span></td>' for name, cell in zip(head, cells, strict=True)
    )


def both(value: str, interval: str) -> str:
    """A number with its interval below."""
    return f"{escape(value)}<small>{escape(interval)}</small>" if interval else escape(value)
