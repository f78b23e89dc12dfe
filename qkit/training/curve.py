"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.pictures import COLORS, SOFT, add_legend, new_picture, save_picture
from qkit.training.folder import read_log
from qkit.training.run import FLOAT

WIDTH = 20  #: steps in the running mean


def draw_log(log: Path, picture: Path) -> None:
    """Draws the losses in `log` as a PNG: training losses, their running mean, and held-out losses. Needs matplotlib."""
    events = read_log(log)
    run: Mapping[str, Any] = next((event["run"] for event in events if isinstance(event.get("run"), dict)), {})
    name = f"{Path(run['out']).name}: loss" if run.get("out") else "Loss"
    grid = run.get("recipe") or "the grids of its model"
    figure, axes = new_picture(
        f"{name} on {grid}" if grid != FLOAT else f"{name} in float", explain(run, events), size=(9, 5)
    )
    floats = grid == FLOAT
    for kind, named, color in (
        ("step", "training text", COLORS["float" if floats else "qat"]),
        ("evaluation", "held-out text" if floats else "held-out text, quantized", COLORS["ptq"]),
    ):
        found = np.array([[event["step"], event["loss"]] for event in events if event["event"] == kind])
        if not len(found):
            continue
        if kind == "step":
            axes.plot(*found.T, color=color, alpha=0.3, linewidth=1)
            axes.plot(found[:, 0], smooth(found[:, 1]), color=color, label=f"{named}, mean of up to {WIDTH} steps")
        else:
            axes.plot(*found.T, "o-", color=color, label=named)
    for step in turns(run):
        axes.axvline(step, color=SOFT, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="loss" if run.get("method") else "loss, nats per token")
    add_legend(figure, axes)
    save_picture(figure, picture)


def explain(run: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    """The beginning of the curves in words: where the layers start to quantize, and the loss there."""
    if run.get("recipe") == FLOAT:
        return "No layer is quantized."
    first = turns(run)
    begin = (
        f"From step {first[0]} on (dotted line), training computes on the grid"
        if first
        else "Training computes on the grid"
    )
    before = [event["loss"] for event in events if event["event"] == "evaluation" and event["step"] == 0]
    if not before:
        return f"{begin}. The first losses are those of weights that were only rounded to it (PTQ)."
    return (
        f"{begin}. Held-out losses are on the grid from step 0 on, where the weights are only rounded to it (PTQ): "
        f"{before[0]:.4f}."
    )


def turns(run: Mapping[str, Any]) -> list[int]:
    """The steps at which the schedule of a run's table changes the grid of training: its start, windows and ramp."""
    table = run.get("quantization") or {}
    steps = {int(table.get("start") or 1)}
    steps |= {int(first) for first, _ in table.get("windows") or ()}
    steps |= {int(last) + 1 for last, _ in table.get("ramp") or ()}
    return sorted(step for step in steps if step > 1)


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running mean over up to 20 steps."""
    total = np.cumsum(losses)
    width = min(WIDTH, len(losses))
    mean: NDArray[np.float64] = np.concatenate(
        [total[:width] / np.arange(1, width + 1), (total[width:] - total[:-width]) / width]
    )
    return mean
