"""The losses as a PNG. It needs matplotlib."""

from pathlib import Path

from qkit.pictures import COLORS, INK, SOFT, new_picture, save_picture
from qkit.report.findings import Comparison
from qkit.report.text import nats, summary, tone


def draw(found: Comparison, file: Path, *, title: str) -> None:
    """Writes the loss of each model above the baseline, with its interval.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = [row for row in found.rows if row.name != found.baseline][::-1]
    figure, axes = new_picture(title, summary(found), size=(9, 2.2 + 0.36 * len(rows)))
    values = [row.above.value for row in rows]
    below = [row.above.value - row.above.low for row in rows]
    over = [row.above.high - row.above.value for row in rows]
    colors = [COLORS[tone(row, found)] for row in rows]
    axes.barh([row.name for row in rows], values, color=colors, xerr=[below, over], ecolor=INK, capsize=3, height=0.68)
    for place, row in enumerate(rows):
        axes.annotate(
            nats(row.above),
            (max(row.above.high, 0.0), place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel(f"nats per token above {found.baseline}, 95 % intervals, paired window by window")
    save_picture(figure, file)
