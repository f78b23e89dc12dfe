"""Two kinds of chart as inline SVG: bars with intervals, and columns for many layers. Colors are classes of the page's style."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qkit.report.intervals import Estimate

WIDTH = 760
ROW = 30  #: height of a bar and the space around it
LABELS = 236  #: width of the names, in units of the picture
VALUES = 90  #: width of the numbers
TALL = 190  #: height of a chart of columns
LARGEST_LABEL = 32  #: letters of a name beside a bar


@dataclass(frozen=True, slots=True)
class Bar:
    """A number with its interval; `tone` is the class that colors it."""

    name: str
    estimate: Estimate
    tone: str


def bars(bars: Sequence[Bar], *, title: str, unit: str, digits: int) -> str:
    """Horizontal bars from zero, with a line over each interval."""
    ends = [0.0, *(end for bar in bars for end in (bar.estimate.low, bar.estimate.high))]
    step, low, high = _scale(min(ends), max(ends))
    height = ROW * len(bars) + 34

    def x(value: float) -> float:
        return LABELS + (value - low) / (high - low) * (WIDTH - LABELS - VALUES)

    parts = [_axis(x, low, high, step, height - 30)]
    for number, bar in enumerate(bars):
        parts.append(_bar(bar, x, 6 + number * ROW, digits))
    said = "; ".join(
        f"{bar.name} {bar.estimate.value:.{digits}f}, {bar.estimate.low:.{digits}f} to {bar.estimate.high:.{digits}f}"
        for bar in bars
    )
    return _svg(height, title, f"{title}, in {unit}, with 95 % intervals: {said}", parts)


def columns(series: Mapping[str, Sequence[float]], names: Sequence[str], *, title: str, tones: Sequence[str]) -> str:
    """Thin columns, one group for each of `names`, with one column of each of `series`. The numbers are shares, in per cent."""
    highest = max((value for values in series.values() for value in values), default=0.0)
    step, _, high = _scale(0.0, 100 * highest)
    left, bottom = 48, TALL - 26
    slot = (WIDTH - left - 8) / max(1, len(names))
    width = min(16.0, slot * 0.8 / len(series))

    def y(value: float) -> float:
        return bottom - value / high * (bottom - 14)

    parts = []
    for tick in _ticks(0.0, high, step):
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:g} %", "tick", "end"))
    for number, name in enumerate(names):
        start = left + number * slot + (slot - width * len(series)) / 2
        for place, (label, values) in enumerate(series.items()):
            top = y(100 * values[number])
            said = f"{name}, {label}: {values[number]:.2%}"
            parts.append(
                f'<rect class="{tones[place]}" x="{start + place * width:.2f}" y="{top:.2f}" width="{width:.2f}" '
                f'height="{max(bottom - top, 0.5):.2f}"><title>{escape(said)}</title></rect>'
            )
    for number in _some(len(names), at_most=12):
        parts.append(_text(left + (number + 0.5) * slot, TALL - 8, str(number + 1), "tick", "middle"))
    means = "; ".join(f"{label}: mean {sum(values) / max(1, len(values)):.2%}" for label, values in series.items())
    return _svg(TALL, title, f"{title}, for {len(names)} layers in order. {means}", parts)


def _bar(bar: Bar, x: Callable[[float], float], top: float, digits: int) -> str:
    one, middle = bar.estimate, top + ROW / 2 - 4
    begin, end = sorted((x(0.0), x(one.value)))
    name = bar.name if len(bar.name) <= LARGEST_LABEL else bar.name[: LARGEST_LABEL - 1] + "…"
    label = f"<g>{_text(LABELS - 10, middle + 4, escape(name), 'name', 'end')}<title>{escape(bar.name)}</title></g>"
    size = f'width="{max(end - begin, 0.5):.2f}" height="{ROW - 10}"'
    body = f'<rect class="{bar.tone}" x="{begin:.2f}" y="{top:.2f}" {size} rx="2"/>'
    caps = "".join(f"M{x(edge):.2f} {middle - 4:.2f}v8" for edge in (one.low, one.high))
    whisker = f'<path class="whisker" d="M{x(one.low):.2f} {middle:.2f}H{x(one.high):.2f}{caps}"/>'
    value = _text(WIDTH - 4, middle + 4, f"{one.value:.{digits}f}".replace("-", "−"), "value", "end")
    return label + body + whisker + value


def _axis(x: Callable[[float], float], low: float, high: float, step: float, bottom: float) -> str:
    parts = []
    for tick in _ticks(low, high, step):
        kind = "zero" if tick == 0 else "rule"
        parts.append(f'<line class="{kind}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{bottom}"/>')
        parts.append(_text(x(tick), bottom + 28, f"{tick:g}".replace("-", "−"), "tick", "middle"))
    return "".join(parts)


def _text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _svg(height: float, title: str, said: str, parts: list[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {WIDTH} {height:g}" preserveAspectRatio="xMidYMid meet">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """A round distance between about four ticks, and the two ends of an axis that includes `low` and `high`."""
    span = high - low or 1.0
    rough = 10.0 ** math.floor(math.log10(span / 4))
    step = next(rough * factor for factor in (1, 2, 2.5, 5, 10) if rough * factor * 5 >= span)
    return step, math.floor(low / step) * step, math.ceil(high / step) * step or step


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [round(number * step, 12) for number in range(round(low / step), round(high / step) + 1)]


def _some(count: int, *, at_most: int) -> range:
    return range(0, count, max(1, -(-count // at_most)))
