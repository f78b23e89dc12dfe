"""The losses of the demo as a PNG, in the style of the report. It needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qkit.pictures import COLORS, SOFT, add_legend, new_picture, save_picture
from qkit.training.curve import WIDTH, smooth

if TYPE_CHECKING:
    from qkit.demo.run import Result

TONES = {"float": "float", "float, longer": "longer", "QAT": "qat"}  #: of each curve


def draw(result: "Result", file: Path) -> None:
    """Writes the training losses of the three models, and their held-out losses as lines.

    Raises:
        ImportError: matplotlib is not installed.
    """
    start = int(result.curves["float"][-1][0])
    note = (
        f"QAT starts at step {start} (dotted line) from the weights of the float model, rounded to the grid: its first losses "
        f"are those of PTQ ({result.ptq_loss:.3f} on held-out text), and training wins them back. The float model trains on, too."
    )
    title = f"A small Llama on {result.recipe}, {result.backend}: float, quantized, trained on the grid"
    figure, axes = new_picture(title, note, size=(9, 5.6))
    for name, curve in result.curves.items():
        steps, losses = np.array(curve).T
        begin = 0 if name == "float" else start
        color, label = COLORS[TONES[name]], f"{name}: training text, mean of up to {WIDTH} steps"
        axes.plot(steps + begin, smooth(losses), color=color, label=label)
    for name, loss, tone in (
        ("float, longer", result.longer_float_loss, "longer"),
        ("PTQ of float, longer", result.longer_ptq_loss, "ptq"),
        ("QAT", result.qat_loss, "qat"),
    ):
        axes.axhline(loss, color=COLORS[tone], linestyle="--", linewidth=1, label=f"{name}: held-out text, {loss:.3f}")
    axes.axvline(start, color=SOFT, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    add_legend(figure, axes)
    save_picture(figure, file)
