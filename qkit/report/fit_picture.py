"""The error of each layer by the rule of its grid, and fitted, as a picture that stands alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qkit import fused, reference
from qkit.artifact.snapshot import read_own
from qkit.fitting.fits import Fit
from qkit.formats.packed import join, unpack
from qkit.reference.steps import FITTED
from qkit.report.charts import columns
from qkit.report.style import CSS
from qkit.storage.read import Stored, read_folder
from qkit.storage.staging import replaced_file

WIDTH = 940  #: pixels
TONES = ("ptq", "qat")
MARGIN, KEY = 16, 26  #: pixels around the picture, and of the line of names above the plot


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of the outputs of one layer, as a share of these outputs: mean squares of both.

    Attributes:
        before: with the codes of the rule of the grid.
        after: with the fitted codes.
    """

    path: str
    before: float
    after: float


def layer_errors(model: Path, out: Path, fit: Fit) -> Iterator[LayerError]:
    """The errors of the layers of the fitted directory `out`, in the order of the model in `model`.

    By the moments of the statistics where they have the layer; else all inputs weigh the same. Where drift was corrected, from
    the weight that the fit aimed at.
    """
    floats, made = read_folder(model)[0], read_own(out)
    paths = [path for path in made.weights if join(path, "weight") in floats]
    grids = {path: made.weights[path].rule.weight for path in paths}
    weights = {path: floats[join(path, "weight")] for path in paths}
    peaks = _peaks({path: weights[path] for path in paths if fused.shares(grids[path])})
    for path in paths:
        grid, w = grids[path], weights[path].mapped()
        if grid is None or grid.scale not in FITTED:
            continue
        aim, h = _known(fit, path)
        wanted = (w if aim is None else aim).astype(np.float64)
        rule = reference.dequantize(reference.quantize(w, grid, peak=peaks.get(path)))
        fitted = reference.dequantize(unpack(made.weights[path].read()))
        whole = _power(wanted, h)
        if whole:
            yield LayerError(path, _power(wanted - rule, h) / whole, _power(wanted - fitted, h) / whole)


def draw_fit(errors: Sequence[LayerError], file: Path, *, title: str) -> None:
    """Writes `fit_svg`.

    Raises:
        PlanError, LockedError: as `replaced_file`.
    """
    with replaced_file(file) as aside:
        aside.write_text(fit_svg(errors, title=title), encoding="utf-8")


def fit_svg(errors: Sequence[LayerError], *, title: str) -> str:
    """An SVG with two columns for each layer: its error by the rule, and fitted."""
    series = {"by the rule": [one.before for one in errors], "fitted": [one.after for one in errors]}
    chart = columns(series, [one.path for one in errors], title=title, tones=TONES)
    inner, top = WIDTH - 2 * MARGIN, 2 * MARGIN + KEY
    tall = float(chart.partition('height="')[2].partition('"')[0])
    named = "".join(
        f'<rect class="{tone}" x="{MARGIN + 130 * number}" y="{MARGIN + 22}" width="11" height="11" rx="2"/>'
        f'<text class="tick" x="{MARGIN + 130 * number + 18}" y="{MARGIN + 32}">{name}</text>'
        for number, (name, tone) in enumerate(zip(series, TONES, strict=True))
    )
    size = f'viewBox="0 0 {WIDTH} {top + tall + MARGIN:g}" width="{WIDTH}"'
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{CSS}</style>',
        '<rect width="100%" height="100%" fill="var(--card)"/>',
        f'<text class="name" x="{MARGIN}" y="{MARGIN + 8}">{escape(title)}</text>{named}',
        f'<svg x="{MARGIN}" y="{top}" width="{inner}" height="{tall:g}">{chart}</svg></svg>\n',
    )
    return "".join(parts)


def _known(fit: Fit, path: str) -> tuple[NDArray[np.float32] | None, NDArray[np.float64] | None]:
    """The weight that a fit aimed at, and the moments of the inputs of the layer; None where there are none."""
    found = fit.statistics
    if found is None or not found.has(path):
        return None, None
    return found.aim(path) if not found.learned(path) else None, found.moments(path).astype(np.float64)


def _power(d: NDArray[np.float64], h: NDArray[np.float64] | None) -> float:
    """The sum over rows of d H d', or of squares."""
    return float((d * d).sum() if h is None else ((d @ h) * d).sum())


def _peaks(weights: Mapping[str, Stored]) -> dict[str, float]:
    """The largest magnitudes of weights that share a tensor scale, by path."""
    peaks = {path: float(np.abs(stored.mapped().astype(np.float32)).max()) for path, stored in weights.items()}
    for together in fused.groups(peaks):
        peaks |= dict.fromkeys(together, max(peaks[path] for path in together))
    return peaks
