"""The loss curve of a run as a picture."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit.storage.staging import replaced_file
from qkit.training.folder import read_log

WIDTH = 20  #: steps in the running mean


def draw_log(log: Path, picture: Path) -> None:
    """Draws the losses in `log` as a PNG: training losses, their running mean, and held-out losses. Needs matplotlib."""
    from matplotlib.figure import Figure

    events = read_log(log)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, name in (("step", "training text"), ("evaluation", "held-out text, quantized")):
        found = np.array([[event["step"], event["loss"]] for event in events if event["event"] == kind])
        if not len(found):
            continue
        if kind == "step":
            axes.plot(*found.T, color="C0", alpha=0.3, linewidth=1)
            axes.plot(found[:, 0], smooth(found[:, 1]), color="C0", label=f"{name}, mean of {WIDTH} steps")
        else:
            axes.plot(*found.T, "o-", color="C1", label=name)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(fontsize="small")
    with replaced_file(picture) as aside:
        figure.savefig(aside, dpi=120)


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running mean over up to 20 steps."""
    total = np.cumsum(losses)
    width = min(WIDTH, len(losses))
    mean: NDArray[np.float64] = np.concatenate(
        [total[:width] / np.arange(1, width + 1), (total[width:] - total[:-width]) / width]
    )
    return mean
