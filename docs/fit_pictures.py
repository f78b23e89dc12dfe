"""Draws how fitted codes are found, from fits of the code itself, and how much each method wins back, into docs/pictures/fit."""

import json
from pathlib import Path

import numpy as np

from qkit import reference
from qkit.grid import Grid
from qkit.reference.fitting import fit
from qkit.reference.moments import DAMPING

FOLDER = Path(__file__).parent / "pictures" / "fit"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"
WIDTH, LEFT, BAR, STEP = 640, 190, 14, 22  #: of a chart in pixels: whole, names, a bar, from one bar to the next
METHODS = {
    "search": ("search, no data", "search"),
    "solve": ("search", "solve"),
    "drift": ("solve", "solve, drift"),
    "round": ("solve, drift", "round"),
}


def searched() -> str:
    """The error of one group on int3 over its scale, in units of the scale that clips nothing."""
    x = np.random.default_rng(5).standard_t(4, 32)
    shares = np.linspace(0.5, 1.15, 27)
    bars = {}
    for share in shares:
        s = np.abs(x).max() / 4 * share
        bars[f"{share:.3f} of the rule's scale"] = float(((np.clip(np.rint(x / s), -4, 3) * s - x) ** 2).sum())
    return chart("the error of a group on int3, for scales that search tries", bars, "{:.2f}")


def solved() -> str:
    """The error of a weight on int3 in its inputs' moments: the rule's, and after each step of solve; the rule's is 1."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1024, 64)) @ random.standard_normal((64, 64)) + random.standard_normal(64)
    h, w = (x.T @ x / len(x)).astype(np.float32), (random.standard_t(5, (32, 64)) * 0.02).astype(np.float32)
    grid, damped = Grid("int3", 32), h + np.eye(64) * DAMPING * h.diagonal().mean()
    codes = {"the rule": reference.quantize(w, grid), "search": fit(w, grid, h)}
    for rounds in range(5):
        name = "feedback" if not rounds else f"descent, round {rounds}"
        codes[name] = fit(w, grid, h, method="solve", rounds=rounds)
    errors = {}
    for name, q in codes.items():
        d = w.astype(np.float64) - reference.dequantize(q)
        errors[name] = float(((d @ damped) * d).sum())
    return chart(
        "the error of a layer on int3",
        {name: e / errors["the rule"] for name, e in errors.items()},
        "{:.3f} of the rule's",
    )


def won(method: str) -> str:
    """The divergence won back by a method, and by the one before it, on every recipe that was measured."""
    bars = {}
    for file in ("fit.json", "fit-learned.json") if method == "round" else ("fit.json",):
        for row in json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]:
            if row["method"] in METHODS[method] and (method != "round" or file == "fit-learned.json"):
                bars[f"{row['recipe']}: {row['method']}"] = max(row["share"]["median"], 0.0)
    return chart(f"percent of rounding's divergence that {method} wins back", bars, "{:.0f}")


def chart(title: str, bars: dict[str, float], form: str) -> str:
    """Bars with names and numbers, as SVG that shows on light and dark pages."""
    most, room = max(bars.values()) or 1.0, WIDTH - LEFT - 110
    lines = []
    for number, (name, value) in enumerate(bars.items()):
        y, long = 24 + number * STEP, value / most * room
        lines.append(
            f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{name}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR}" fill="#4f6bed"/>'
            f'<text x="{LEFT + long + 5:.1f}" y="{y + 11}">{form.format(value)}</text>'
        )
    height = 30 + len(bars) * STEP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f"<title>{title}</title>"
        f'<g font-family="sans-serif" font-size="11" fill="#777"><text x="2" y="12">{title}</text>{"".join(lines)}</g></svg>\n'
    )


def drawn() -> dict[str, str]:
    """Every picture by its name."""
    how = {"how-search.svg": searched(), "how-solve.svg": solved()}
    return how | {f"{method}.svg": won(method) for method in METHODS}


def main() -> None:
    """Writes the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in drawn().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
