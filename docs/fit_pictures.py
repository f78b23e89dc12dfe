"""Draws how fitted codes are found, from fits of the code itself, and how much each method wins back, into docs/pictures/fit."""

import json
from pathlib import Path

import numpy as np

from qkit import drift, reference
from qkit.fitting.inputs import Inputs
from qkit.fitting.rows import solve_rows
from qkit.grid import Grid
from qkit.reference.fitting import ROUNDS, fit
from qkit.reference.moments import DAMPING
from qkit.reference.rounding import scale_values
from qkit.report.fit_picture import LayerError, fit_svg

FOLDER = Path(__file__).parent / "pictures" / "fit"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"
WIDTH, LEFT, BAR, STEP = 640, 190, 14, 22  #: of a chart in pixels: whole, names, a bar, from one bar to the next
METHODS = {
    "search": ("search, no data", "search"),
    "solve": ("search", "solve"),
    "drift": ("solve", "solve, drift"),
    "round": ("solve, drift", "round"),
    "scales": ("solve, drift", "solve, drift, scales trained"),
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
    for rounds in range(ROUNDS + 1):
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


def drifted() -> str:
    """The distance of the states from the float ones after each of six int3 blocks, solved without and with correction."""
    random = np.random.default_rng(3)
    x = random.standard_normal((2048, 64)).astype(np.float32) @ random.standard_normal((64, 64)).astype(np.float32) / 8
    weights = [random.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(6)]
    bars: dict[str, float] = {}
    for corrects in (False, True):
        float_states, states = x.astype(np.float64), x.astype(np.float64)
        for number, w in enumerate(weights, start=1):
            wanted, inputs = float_states + np.tanh(float_states) @ w.T, np.tanh(states)
            h, aim = inputs.T @ inputs / len(inputs), w.astype(np.float64)
            if corrects:
                missing = (wanted - states - inputs @ aim.T).T @ inputs / len(inputs)
                aim = aim + np.linalg.solve(h + np.eye(64) * drift.DAMPING * h.diagonal().mean(), missing.T).T
            q = fit(aim.astype(np.float32), Grid("int3", 32), h.astype(np.float32), method="solve")
            float_states, states = wanted, states + inputs @ reference.dequantize(q).astype(np.float64).T
            apart = float(((states - float_states) ** 2).sum() / (float_states**2).sum())
            bars[f"block {number}: solve{', corrected' if corrects else ''}"] = 100 * apart
    return chart("how far the states of a toy are from the float ones", dict(sorted(bars.items())), "{:.2f} %")


def learned() -> str:
    """The error of a toy's block of two int2 layers, in units of the solved one, while sign descent moves offsets."""
    random, grid = np.random.default_rng(4), Grid("int2", 32)
    x = random.standard_normal((512, 32)) @ random.standard_normal((32, 32)) / 5
    first, second = (random.standard_normal(shape).astype(np.float32) / 6 for shape in ((64, 32), (32, 64)))
    wanted, inner = np.maximum(x @ first.T, 0) @ second.T, np.maximum(x @ first.T, 0)
    q = [
        fit(w, grid, (inputs.T @ inputs / len(x)).astype(np.float32), method="solve")
        for w, inputs in ((first, x), (second, inner))
    ]
    steps = [np.repeat(scale_values(one), 32, axis=-1).astype(np.float64) for one in q]
    codes, offsets, bars, whole = [one.codes.astype(np.float64) for one in q], [0.0, 0.0], dict[str, float](), 0.0
    for step in range(121):
        one, two = (
            np.clip(np.rint(code + offset), -2, 1) * s for code, offset, s in zip(codes, offsets, steps, strict=True)
        )
        error = float(((np.maximum(x @ one.T, 0) @ two.T - wanted) ** 2).mean())
        whole = whole or error
        if not step % 20:
            bars["solved codes" if not step else f"after {step} steps"] = error / whole
        some = random.integers(0, len(x), 48)
        before = x[some] @ one.T
        hidden = np.maximum(before, 0)
        d = hidden @ two.T - wanted[some]
        slopes = ((d @ two * (before > 0)).T @ x[some] * steps[0], d.T @ hidden * steps[1])
        rate = (
            1.3 / 120 * (1 - step / 120)
        )  # offsets whose slopes always agree move by two thirds of the distance of two codes
        offsets = [offset - rate * np.sign(slope) for offset, slope in zip(offsets, slopes, strict=True)]
    return chart("the error of a toy's block while its rounding learns", bars, "{:.3f} of the solved one's")


def coupled() -> str:
    """A toy weight on int3, whose outputs' errors count by a metric: rounded, solved row by row, and with coupled rows."""
    random = np.random.default_rng(8)
    h, f = (
        (x.T @ x / len(x)).astype(np.float32)
        for x in (random.standard_normal((512, 64)) @ random.standard_normal((64, 64)) for _ in range(2))
    )
    w, grid, known = random.standard_normal((64, 64)).astype(np.float32), Grid("int3", 32), Inputs(h)
    found = {
        "by the rule": reference.quantize(w, grid),
        "solved": solve_rows(w, grid, known, None, peak=None)[1],
        "solved, rows coupled": solve_rows(w, grid, known, f, peak=None)[1],
    }
    errors = {name: w - reference.dequantize(q) for name, q in found.items()}
    losses = {name: float(np.trace(f @ d @ h @ d.T)) for name, d in errors.items()}
    bars = {name: loss / losses["by the rule"] for name, loss in losses.items()}
    return chart("the error of a toy's outputs, as the rest of a model counts it", bars, "{:.2f} of the rule's")


def by_layer() -> str:
    """The picture of `quantize --picture`, of two toy blocks on int3."""
    random, errors = np.random.default_rng(6), []
    for number in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            x = random.standard_normal((512, 64)) @ random.standard_normal((64, 64))
            w, h = random.standard_normal((64, 64)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)
            grid, whole = Grid("int3", 32), float(((w @ h) * w).sum())
            found = (reference.quantize(w, grid), fit(w, grid, h, method="solve"))
            shares = [float(((d @ h) * d).sum()) / whole for d in (w - reference.dequantize(q) for q in found)]
            errors.append(LayerError(f"model.layers.{number}.{name}", *shares))
    return fit_svg(errors, title="the error of each layer's outputs, int3")


def won(method: str) -> str:
    """The divergence won back by a method, and by the one before it, on every recipe that was measured."""
    bars = {}
    rows = json.loads((RESULTS / "fit.json").read_text(encoding="utf-8"))["rows"]
    recipes = [row["recipe"] for row in rows if row["method"] == METHODS[method][1]]
    for row in rows:
        if row["method"] in METHODS[method] and row["recipe"] in recipes:
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
    how = {"how-search.svg": searched(), "how-solve.svg": solved(), "how-drift.svg": drifted()}
    how |= {"how-rows.svg": coupled(), "how-round.svg": learned(), "layers.svg": by_layer()}
    return how | {f"{method}.svg": won(method) for method in METHODS}


def main() -> None:
    """Writes the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in drawn().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
