"""The report as one HTML page that loads nothing: style and charts are inside, and there are no scripts."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from qkit.report.about import About, to_json
from qkit.report.charts import Bar, Point, bars, columns, points
from qkit.report.code_changes import CodeChange
from qkit.report.findings import Comparison
from qkit.report.footer import footer
from qkit.report.markup import both, figure, table
from qkit.report.place import check_report
from qkit.report.style import CSS
from qkit.report.text import (
    nats,
    nats_between,
    share,
    share_between,
    size,
    summary,
    tone,
    turned,
    verdict,
    verdict_between,
)
from qkit.storage.staging import replaced_file

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="qkit">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><h1>$title</h1><p class="lede">$summary</p></header>
$figures
$losses
$premiums
$moves
</main>
<footer>
$footer
</footer>
</body>
</html>
""")


def render_page(found: Comparison, source: About, *, title: str) -> str:
    """The whole page. Escapes every text that comes from a file or a caller."""
    return PAGE.substitute(
        title=escape(title),
        style=CSS,
        summary=escape(summary(found)),
        figures=_figures(found),
        losses=_losses(found, source),
        premiums=_premiums(found) if found.premiums else "",
        moves=_code_changes(found) if found.trained else "",
        footer=footer(found, source),
    )


def write(folder: Path, found: Comparison, source: About, *, title: str) -> Path:
    """Writes report.html and report.json into `folder`, which it creates if needed. Returns the path of the page.

    Raises:
        ArtifactError, PlanError: see `check_report`.
    """
    check_report(folder)
    for name, text in (
        ("report.json", to_json(found, source)),
        ("report.html", render_page(found, source, title=title)),
    ):
        with replaced_file(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return folder / "report.html"


def _figures(found: Comparison) -> str:
    if not found.premiums:
        return ""
    home, *others = found.premiums
    tiles = [
        *((f"of the cost of {name} won back", share(one), share_between(one)) for name, one in home.recovered.items()),
        *(
            (f"training, over {name}, nats", verdict(turned(gain)), verdict_between(turned(gain)))
            for name, gain in home.training.items()
        ),
        *(
            (f"deploying on {other.grid}, nats", verdict(other.deployment), verdict_between(other.deployment))
            for other in others
            if other.deployment
        ),
        ("codes flipped by training", _flipped(found.trained), f"of {sum(m.numbers for m in found.trained):,} weights"),
    ]
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _losses(found: Comparison, source: About) -> str:
    tones = [tone(row, found) for row in found.rows]
    whole = [Bar(row.name, row.loss, color) for row, color in zip(found.rows, tones, strict=True)]
    above = [
        Bar(row.name, row.above, color)
        for row, color in zip(found.rows, tones, strict=True)
        if row.name != found.baseline
    ]
    note = f"{found.tokens:,} tokens in {found.windows:,} windows of {found.length}"
    rows = [
        [
            row.name,
            both(nats(row.loss), nats_between(row.loss)),
            both(nats(row.above), nats_between(row.above)) if row.name != found.baseline else "",
            f"{row.perplexity:.3f}",
            f"{row.loss.value * source.tokens_per_byte / 0.6931471805599453:.4f}",
            f"{row.kl:.5f}",
            f"{row.agreement:.1%}",
            f"{row.bits:.2f}",
            size(row.nbytes),
        ]
        for row in found.rows
    ]
    head = [
        "model",
        "loss",
        f"above {found.baseline}",
        "perplexity",
        "bits per byte",
        "KL from float",
        "same token",
        "bits per weight",
        "size",
    ]
    unit, base = "nats per token", f"Loss above {found.baseline}"
    made = "".join(f"<li>{escape(row.name)}: {escape(row.source)}</li>" for row in found.rows)
    charts = [
        figure("Loss", unit, bars(whole, title="Loss", unit=unit, digits=4), tones),
        figure(base, f"{unit}, paired window by window", bars(above, title=base, unit=unit, digits=4), tones),
        _sizes(found, tones),
    ]
    return f"""<section aria-labelledby="losses"><h2 id="losses">Losses</h2>
<p class="note">{escape(note)}. Lines over the bars are 95 % intervals: windows of text drawn anew, the same for every model.</p>
{"".join(charts)}{table("Every model", head, rows)}
<details><summary>Source of each model</summary><ul class="note">{made}</ul></details></section>"""


def _sizes(found: Comparison, tones: Sequence[str]) -> str:
    largest = max(row.nbytes for row in found.rows)
    unit, many = next(
        (unit, many) for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= many or unit == "kB"
    )
    spots = [
        Point(row.name, row.nbytes / many, row.loss.value, one) for row, one in zip(found.rows, tones, strict=True)
    ]
    chart = points(spots, title="Size and loss", across=unit, up="nats per token")
    return figure(
        "Size and loss", f"nats per token, over {unit} of all tensors: best is below on the left", chart, tones
    )


def _premiums(found: Comparison) -> str:
    untrained = list(found.premiums[0].training)
    rows = [
        [
            premium.grid + (" (trained for)" if premium.deployment is None else ""),
            *(both(verdict(turned(one)), verdict_between(turned(one))) for one in premium.training.values()),
            ""
            if premium.deployment is None
            else both(verdict(premium.deployment), verdict_between(premium.deployment)),
            *(both(share(one), share_between(one)) for one in premium.recovered.values()),
        ]
        for premium in found.premiums
    ]
    note = (
        "Training is compared with each untrained baseline on one grid: the loss of QAT less that of "
        f"{' or '.join(untrained)}, all on that grid. Deploying compares the trained weights on a grid with the same weights on "
        "the grid they were trained for. The share won back is of the cost of quantizing: the loss of the untrained baseline "
        f"less that of {found.baseline}, the better float model."
    )
    masters = f"Weights on the other grids: {found.masters}. " if found.deployed else ""
    if found.masters_equal:
        equal, numbers = found.masters_equal
        whose = "their codes" if found.deployed else f"the codes of {found.masters}"
        masters += f"On the trained grid, {equal:,} of {numbers:,} of {whose} equal those of the trained model."
    head = [
        "deployed on",
        *(f"training, over {name}" for name in untrained),
        f"deploying, over {found.recipe}",
        *(f"won back of {name}'s cost" for name in untrained),
    ]
    return f"""<section aria-labelledby="premiums"><h2 id="premiums">Training and deployment apart</h2>
<p class="note">{escape(note)}</p>{table("Costs and savings, nats per token", head, rows)}
<p class="note">{escape(masters)}</p></section>"""


def _code_changes(found: Comparison) -> str:
    series = {f"PTQ to QAT on {found.recipe}": found.trained} | {
        f"QAT to {grid}": changes for grid, changes in found.deployed.items()
    }
    names = [change.path for change in found.trained]
    tones = ["qat", *(("moved", "moved-too")[number % 2] for number in range(len(found.deployed)))]
    flipped = {
        name: [(change.flipped or 0) / change.numbers for change in changes]
        for name, changes in series.items()
        if len(changes) == len(names) and all(change.flipped is not None for change in changes)
    }
    errors = {
        name: [change.error for change in changes] for name, changes in series.items() if len(changes) == len(names)
    }
    charts = [
        figure(
            caption, unit, columns(some, names, title=caption, tones=_tones(some, series, tones)), [], list(some), tones
        )
        for caption, unit, some in (
            ("Codes flipped", "share of the weights of each layer, layers in the order of the model", flipped),
            ("Values moved", "distance of the values, relative to the first's: root mean squares", errors),
        )
        if some
    ]
    tables = "".join(
        f"<details><summary>{escape(name)}, layer by layer</summary>{_change_table(name, changes)}</details>"
        for name, changes in series.items()
    )
    note = (
        "A code counts as flipped if it stands for another multiple of its group's step. A step whose sign alone changes flips "
        "nothing. Between grids of different elements the table compares values, and no codes."
    )
    return f"""<section aria-labelledby="moves"><h2 id="moves">Changed codes and values</h2><p class="note">{escape(note)}</p>
{"".join(charts)}{tables}</section>"""


def _tones(some: Iterable[str], series: Iterable[str], tones: Sequence[str]) -> list[str]:
    known = dict(zip(series, tones, strict=True))
    return [known[name] for name in some]


def _change_table(name: str, changes: Sequence[CodeChange]) -> str:
    rows = [
        [
            change.path,
            f"{change.numbers:,}",
            "" if change.flipped is None else f"{change.flipped:,}",
            "" if change.flipped is None else f"{change.flipped / change.numbers:.2%}",
            f"{change.steps:.3f}",
            f"{change.error:.3%}",
        ]
        for change in changes
    ]
    return table(name, ["layer", "weights", "flipped", "share", "mean distance, steps", "relative distance"], rows)


def _flipped(changes: Sequence[CodeChange]) -> str:
    counted = [change for change in changes if change.flipped is not None]
    numbers = sum(change.numbers for change in counted)
    return f"{sum(change.flipped or 0 for change in counted) / numbers:.2%}" if numbers else "not comparable"
