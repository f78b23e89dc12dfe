"""The style of the pictures that qkit draws by matplotlib: that of the report's page. The legend is below the curves."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from qkit.storage.staging import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFTWARE: Final = {"Software": "qkit"}  #: metadata of a picture
INK, SOFT, LINE, PAPER = "#1f2328", "#5e6670", "#e3e0d9", "#fbfaf7"
COLORS: Final = {"float": "#8b939d", "ptq": "#c77d1e", "longer": "#e3bd8a", "qat": "#12786f", "moved": "#7456b3"}
#: Colors of things that have none of their own.
SERIES: Final = ("#12786f", "#c77d1e", "#7456b3", "#b4557f", "#3b76b8", "#8a8d2e", "#8b939d", "#1f2328")
DOTS: Final = 140  #: per inch
NAMES: Final = 2.4  #: inches left of a plot that the names of bars take at most
LETTERS: Final = 14.0  #: letters of a note in an inch


def new_picture(title: str, note: str, *, size: tuple[float, float]) -> "tuple[Figure, Axes]":
    """An empty picture of `size` in inches: its title, a note of one or more sentences below it, and room for the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.set_facecolor(PAPER)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK, parse_math=False)
    lines = fill(note, int((size[0] - NAMES) * LETTERS))
    axes.set_title(lines, loc="left", fontsize="small", color=SOFT, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=SOFT, length=0)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """The names of the curves of `axes`, below the plot."""
    handles, labels = axes.get_legend_handles_labels()
    names: dict[str, Any] = dict(zip(labels, handles, strict=True))
    figure.legend(
        names.values(),
        names,
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize="small",
        labelcolor=INK,
    )


def save_picture(figure: "Figure", file: Path) -> None:
    """Writes the picture as a PNG, with the same bytes for the same content."""
    with replaced_file(file) as aside:
        figure.savefig(aside, dpi=DOTS, metadata=SOFTWARE, format="png")
