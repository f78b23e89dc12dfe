"""Draws the levels of every grid of a recipe, as the reference computes them, into docs/pictures/grids.

A group's largest element is 1, its smallest -0.8. Ticks are the values that the group's elements can take.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from generated import pictured

import qkit

FOLDER = Path(__file__).parent / "pictures" / "grids"
HIGH, LOW = 1.0, -0.8
WIDTH, HEIGHT, MARGIN, LEFT, RIGHT = 720, 64, 20, -1.25, 1.25
GROUPS = {"nvfp4": 16}  #: other rules take any group
TRIED = 4000  #: groups


def levels(element: str, scale: str) -> NDArray[np.float32]:
    """Every value that occurs in many groups with the same extremes, ascending [n]."""
    group = GROUPS.get(scale, 32)
    inner = np.linspace(LOW, HIGH, TRIED * (group - 2), dtype=np.float32).reshape(TRIED, group - 2)
    ends = np.broadcast_to(np.array([HIGH, LOW], np.float32), (TRIED, 2))
    groups = np.concatenate([ends, inner], axis=1)
    return np.unique(qkit.dequantize(qkit.quantize(groups, qkit.Grid(element, group, scale))))


def picture(element: str, scale: str) -> str:
    """The drawing as SVG. It has no fonts of its own and no colors that a dark page would hide."""
    found = levels(element, scale)
    axis = HEIGHT - 26
    ticks = "".join(f"M{_x(float(level)):.1f} {axis - 14}v28" for level in found)
    ends = "".join(f"M{_x(end):.1f} {axis - 17}l-5 -9h10z" for end in (HIGH, LOW))
    numbers = "".join(
        f'<text x="{_x(at):.1f}" y="{HEIGHT - 1}" text-anchor="middle">{at:g}</text>'
        for at in (-1.0, -0.5, 0.0, 0.5, 1.0)
    )
    clipped = f"{len(found)} levels, from {found[0]:.4g} to {found[-1]:.4g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
        f"<title>{element}, {scale}: {clipped}</title>"
        f'<g font-family="sans-serif" font-size="11" fill="#777">{numbers}'
        f'<text x="2" y="11">{clipped}</text></g>'
        f'<path d="M{MARGIN} {axis}H{WIDTH - MARGIN}" stroke="#999"/>'
        f'<path d="{ticks}" stroke="#4f6bed" stroke-width="{1.6 if len(found) < 40 else 0.8}"/>'
        f'<path d="{ends}" fill="#d9622b"/></svg>\n'
    )


def _x(value: float) -> float:
    return MARGIN + (value - LEFT) / (RIGHT - LEFT) * (WIDTH - 2 * MARGIN)


def main() -> None:
    """Writes a picture for each pair of an element and a scale rule, and removes others."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = {f"{element}-{scale}.svg": picture(element, scale) for element, scale in sorted(pictured() | SHOWN)}
    for file in FOLDER.glob("*.svg"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


#: Pairs that no recipe has, for the page of scale rules.
SHOWN = {("e2m1", "floor"), ("e2m1", "rceil"), ("int4", "absmax"), ("int3", "minmax"), ("int3", "signed")}


if __name__ == "__main__":
    main()
