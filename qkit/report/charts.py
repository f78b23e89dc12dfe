"""Bars with intervals, points and columns as inline SVG. Colors are classes of the page's style.

Places across are in per cent of the width and heights in pixels, so that text has one size on every screen. Labels are above
bars, and nothing is beside the plot.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qkit.report.intervals import Estimate

ROW = 46  #: height of a bar, its name and the space around it
BAR = 18  #: height of a bar
AXIS = 26  #: height of the numbers below a plot
LARGEST_LABEL = 42  #: letters of a name above a bar
LONG = 40.0  #: per cent of the width: a bar of this length has its number inside
TALL = 170  #: height of a plot of columns, and
HIGH = 250  #: of points
NARROW = 2.2  #: per cent of the width of a letter of a name on a screen of 375 pixels
LETTER = 6.2  #: pixels of a letter of a small label
LABELS = 24  #: the most names below columns, and the most letters of the name of a point
LEFT, RIGHT = 12.0, 99.0  #: per cent of the width: the ends of a plot with numbers on its left


@dataclass(frozen=True, slots=True)
class Bar:
    """A number with its interval; `tone` is the class that colors it."""

    name: str
    estimate: Estimate
    tone: str


@dataclass(frozen=True, slots=True)
class Point:
    """A model at a size and a loss; `tone` is the class that colors it."""

    name: str
    x: float
    y: float
    tone: str


def bars(bars: Sequence[Bar], *, title: str, unit: str, digits: int) -> str:
    """Horizontal bars from zero, with a line over each interval."""
    ends = [0.0, *(end for bar in bars for end in (bar.estimate.low, bar.estimate.high))]
    step, low, high = _scale(min(ends), max(ends))
    height = ROW * len(bars)
    x = _across(low, high, 1.0, RIGHT)
    parts = [_axis(x, low, high, step, height)]
    for number, bar in enumerate(bars):
        parts.append(_bar(bar, x, number * ROW, digits))
    said = "; ".join(
        f"{bar.name} {bar.estimate.value:.{digits}f}, {bar.estimate.low:.{digits}f} to {bar.estimate.high:.{digits}f}"
        for bar in bars
    )
    return _svg(height + AXIS, title, f"{title}, in {unit}, with 95 % intervals: {said}", parts)


def points(points: Sequence[Point], *, title: str, across: str, up: str) -> str:
    """Models as points: `across` and `up` name the two axes. Names stand beside their points, apart from each other."""
    step, low, high = _scale(min(one.x for one in points), max(one.x for one in points))
    rise, bottom, top = _scale(min(one.y for one in points), max(one.y for one in points))
    x = _across(low, high, LEFT + 2, RIGHT - 2)

    def y(value: float) -> float:
        return 16 + (top - value) / (top - bottom) * (HIGH - 24)

    parts = [_axis(x, low, high, step, HIGH), *_levels(y, bottom, top, rise, "{:g}")]
    below = 0.0
    for one in sorted(points, key=lambda one: -one.y):  # from the top down: each name is at least a line below the last
        below = max(y(one.y) + 4, below + 15)
        left = x(one.x) < 55
        said = f"<title>{escape(f'{one.name}: {one.x:g} {across}, {one.y:.4f} {up}')}</title>"
        parts.append(f'<circle class="{one.tone}" cx="{x(one.x):.2f}%" cy="{y(one.y):.1f}" r="5">{said}</circle>')
        label = _text(x(one.x), below, escape(_cut(one.name, LABELS)), "point", "start" if left else "end")
        parts.append(f'<g transform="translate({9 if left else -9} 0)">{label}</g>')
    said = "; ".join(f"{one.name} {one.x:g} {across}, {one.y:.4f} {up}" for one in points)
    return _svg(max(HIGH, math.ceil(below) + 4) + AXIS, title, f"{title}, {up} over {across}: {said}", parts)


def columns(series: Mapping[str, Sequence[float]], names: Sequence[str], *, title: str, tones: Sequence[str]) -> str:
    """Thin columns, one group for each of `names`, with one column of each of `series`. The numbers are shares, in per cent.

    The names of at most `LABELS` groups stand below, without their common beginning.
    """
    highest = max((value for values in series.values() for value in values), default=0.0)
    step, _, high = _scale(0.0, 100 * highest)
    slot = (RIGHT - LEFT) / max(1, len(names))
    width = min(3.0, slot * 0.8 / len(series))
    short = _without_common(names)

    def y(value: float) -> float:
        return TALL - value / high * (TALL - 18)

    parts = _levels(y, 0.0, high, step, "{:g} %")
    for number, name in enumerate(names):
        start = LEFT + number * slot + (slot - width * len(series)) / 2
        for place, (label, values) in enumerate(series.items()):
            top = y(100 * values[number])
            said = f"{name}, {label}: {values[number]:.2%}"
            parts.append(
                f'<rect class="{tones[place]}" x="{start + place * width:.3f}%" y="{top:.2f}" width="{width:.3f}%" '
                f'height="{max(TALL - top, 0.5):.2f}"><title>{escape(said)}</title></rect>'
            )
    shown = _some(len(names), at_most=LABELS)
    for number in shown:
        label = (
            f'<text class="tick" transform="rotate(-90)" x="0" y="4" text-anchor="end">{escape(short[number])}</text>'
        )
        parts.append(f'<svg x="{LEFT + (number + 0.5) * slot:.2f}%" y="{TALL + 7}" overflow="visible">{label}</svg>')
    longest = max((len(short[number]) for number in shown), default=0)
    means = "; ".join(f"{label}: mean {sum(values) / max(1, len(values)):.2%}" for label, values in series.items())
    height = TALL + 14 + LETTER * longest
    return _svg(math.ceil(height), title, f"{title}, for {len(names)} layers in order. {means}", parts)


def _bar(bar: Bar, x: Callable[[float], float], top: float, digits: int) -> str:
    one, middle = bar.estimate, top + 20 + BAR / 2
    begin, end = sorted((x(0.0), x(one.value)))
    name = _cut(bar.name, LARGEST_LABEL)
    start = x(min(0.0, one.value))
    ahead, behind = start + NARROW * len(name) <= 100, start >= NARROW * len(name)
    place, anchor = (
        (start, "start") if ahead else (start, "end") if behind else (0.0, "start")
    )  # nothing is cut at an edge
    label = f"<g>{_text(place, top + 15, escape(name), 'name', anchor)}<title>{escape(bar.name)}</title></g>"
    size = f'width="{max(end - begin, 0.2):.2f}%" height="{BAR}"'
    body = f'<rect class="{bar.tone}" x="{begin:.2f}%" y="{top + 20:.1f}" {size} rx="2"/>'
    whisker = _line("whisker", x(one.low), x(one.high), middle, middle)
    whisker += "".join(_line("whisker", x(edge), x(edge), middle - 4, middle + 4) for edge in (one.low, one.high))
    text = f"{one.value:.{digits}f}".replace("-", "−")
    last, first = x(max(one.high, 0.0)), x(min(one.low, 0.0))
    if end - begin >= LONG:
        place, shift, anchor = (begin, 8, "start") if one.value >= 0 else (end, -8, "end")
    else:
        place, shift, anchor = (last, 7, "start") if last <= 100 - LONG / 2 else (first, -7, "end")
    value = f'<g transform="translate({shift} 0)">{_text(place, middle + 4.5, text, "value", anchor)}</g>'
    return label + body + whisker + value


def _axis(x: Callable[[float], float], low: float, high: float, step: float, bottom: float) -> str:
    parts = []
    ticks = _ticks(low, high, step)
    for tick in ticks:
        parts.append(_line("zero" if tick == 0 else "rule", x(tick), x(tick), 0, bottom))
        anchor = {ticks[0]: "start", ticks[-1]: "end"}.get(tick, "middle")  # so that no number is cut at an edge
        parts.append(_text(x(tick), bottom + 18, f"{tick:g}".replace("-", "−"), "tick", anchor))
    return "".join(parts)


def _levels(y: Callable[[float], float], low: float, high: float, step: float, form: str) -> list[str]:
    """Horizontal lines, each with its number above it on the left."""
    parts = []
    for tick in _ticks(low, high, step):
        parts.append(_line("rule", 0, 100, y(tick), y(tick)))
        parts.append(_text(0, y(tick) - 3, form.format(tick), "tick", "start"))
    return parts


def _across(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    return lambda value: left + (value - low) / (high - low) * (right - left)


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _without_common(names: Sequence[str]) -> list[str]:
    """`names` without the parts, between dots, that all of them begin with; the last letters of long ones."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    short = [".".join(one[common:]) for one in parts]
    return [one if len(one) <= LABELS else "…" + one[1 - LABELS :] for one in short]


def _svg(height: float, title: str, said: str, parts: list[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg role="img" aria-label="{escape(said)}" width="100%" height="{height:g}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """A round distance between about four ticks, and the two ends of an axis that includes `low` and `high`."""
    span = high - low or abs(high) or 1.0
    rough = 10.0 ** math.floor(math.log10(span / 4))
    step = next(rough * factor for factor in (1, 2, 2.5, 5, 10) if rough * factor * 4 >= span)
    begin = math.floor(low / step) * step
    return step, begin, max(math.ceil(high / step) * step, begin + step)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [round(number * step, 12) for number in range(round(low / step), round(high / step) + 1)]


def _some(count: int, *, at_most: int) -> range:
    return range(0, count, max(1, -(-count // at_most)))
