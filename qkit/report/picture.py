"""The losses as a PNG. This is the only module of the report that needs matplotlib."""

from pathlib import Path

from qkit.report.findings import Comparison
from qkit.report.place import SOFTWARE
from qkit.report.text import nats, summary, tone
from qkit.storage.staging import replaced_file

COLORS = {"float": "#8b939d", "ptq": "#c77d1e", "longer": "#e3bd8a", "qat": "#12786f", "moved": "#7456b3"}


def draw(found: Comparison, file: Path, *, title: str) -> None:
    """Writes the loss of each model above the baseline, with its interval.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if row.name != found.baseline][::-1]
    figure = Figure(figsize=(9, 1.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [row.above.value for row in rows]
    below = [row.above.value - row.above.low for row in rows]
    over = [row.above.high - row.above.value for row in rows]
    colors = [COLORS[tone(row, found)] for row in rows]
    axes.barh([row.name for row in rows], values, color=colors, xerr=[below, over], capsize=3, height=0.68)
    for place, row in enumerate(rows):
        axes.annotate(
            nats(row.above), (max(row.above.high, 0.0), place), (6, 0), textcoords="offset points", va="center"
        )
    axes.axvline(0, color="#5e6670", linewidth=1)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"nats per token above {found.baseline}, 95 % intervals, paired window by window")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
    axes.set_title(summary(found), loc="left", fontsize="small", color="#5e6670", wrap=True, parse_math=False)
    with replaced_file(file) as aside:
        figure.savefig(aside, dpi=140, metadata=SOFTWARE)
