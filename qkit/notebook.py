"""HTML for notebooks: tables without scripts, in the colors of the page around them."""

from collections.abc import Iterable, Sequence
from html import escape

CELL = "text-align:left;padding:2px 12px 2px 0"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain text, all of which is escaped."""
    top = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in head)
    lines = ("".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in cells) for cells in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    title = f'<caption style="text-align:left;font-weight:bold">{escape(caption)}</caption>'
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
