"""The errors of each layer as a PNG, in the style of the report. It needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from qkit.exchange.diff import Difference
from qkit.pictures import SERIES, add_legend, new_picture, save_picture

NAMES = 24  #: the most layers whose full names stand below the points


def draw(found: Sequence[Difference], file: Path, *, title: str) -> None:
    """Writes the SQNR of every layer that differs, in the order of the model: one color for each kind of projection.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = [
        (row.name.removesuffix(".weight"), row.error.sqnr) for row in found if row.error and row.error.sqnr is not None
    ]
    note = "SQNR in dB, the power of the weights over that of their errors: higher is better, and 6 dB are one bit."
    figure, axes = new_picture(title, note if layers else "No layer differs.", size=(9, 5))
    kinds: dict[str, list[tuple[int, float]]] = {}
    for place, (name, decibels) in enumerate(layers):
        kinds.setdefault(name.rpartition(".")[2], []).append((place, decibels))
    for number, (kind, spots) in enumerate(kinds.items()):
        axes.plot(*zip(*spots, strict=True), "o", color=SERIES[number % len(SERIES)], markersize=5, label=kind)
    axes.set(ylabel="SQNR, dB")
    if len(layers) <= NAMES:
        axes.set_xticks(range(len(layers)), [name for name, _ in layers], rotation=90, fontsize="x-small")
    else:
        step = -(-len(layers) // NAMES)
        shown = range(0, len(layers), step)
        axes.set_xticks(shown, [layers[place][0] for place in shown], rotation=90, fontsize="x-small")
    if kinds:
        add_legend(figure, axes)
    save_picture(figure, file)
