"""`qkit compare FLOAT --recipe R`: the gain of training on a grid, and the cost of another one. The work is in `qkit.report`."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import qkit
from qkit.cli.completing import recipe_names
from qkit.cli.console import Json, console, errors, print_json
from qkit.cli.eval import Data, Device, Engine, Length, Windows
from qkit.cli.opened import values_of
from qkit.cli.progress import counting
from qkit.cli.quantize import SkipIndivisible
from qkit.engines.abilities import require
from qkit.engines.protocol import Builds
from qkit.installation import ENGINE, how_to_install
from qkit.overrides import overridden

if TYPE_CHECKING:
    from qkit.report import Comparison
    from qkit.report.measured import Measurements


def compare(
    floats: Annotated[
        Path,
        typer.Argument(
            metavar="FLOAT", help="The float model's directory; of a quantized one, its values.", callback=values_of
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Where report.html, report.json and report.png go.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file. Left out: the rules of --qat's layers.",
            autocompletion=recipe_names,
        ),
    ] = None,
    skip_indivisible: SkipIndivisible = False,
    deploy_recipe: Annotated[
        list[str] | None, typer.Option(help="Another grid to put the same weights on; give it again for more.")
    ] = None,
    qat: Annotated[Path | None, typer.Option(help="The directory that was trained on the grid.")] = None,
    ptq: Annotated[
        Path | None, typer.Option(help="A directory quantized without training. Left out: FLOAT is converted.")
    ] = None,
    masters: Annotated[
        Path | None,
        typer.Option(
            help="The master weights of --qat, a float directory or a checkpoint. Left out: the last checkpoint in "
            "--qat's run folder; without one, --qat's dequantized values."
        ),
    ] = None,
    longer: Annotated[
        Path | None, typer.Option(help="The float model after as many more steps as --qat: the fair baseline.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The title of the page.")] = None,
    backend: Engine = None,
    device: Device = None,
    length: Length = 256,
    windows: Windows = None,
    as_json: Json = False,
) -> None:
    """Compare a model in float, quantized, trained on the grid, and deployed on another grid: table, picture and page.

    Each model that is measured is kept in OUT: after a failure or an interruption, the same command goes on from there.
    """
    from qkit.evaluation import consecutive, read_alike  # here, so that other commands start fast
    from qkit.report import Sources, compare, describe_source, to_json, write
    from qkit.report.about import installed
    from qkit.report.master_weights import newest_checkpoint
    from qkit.report.measured import FILE, Measurements, setting_of
    from qkit.report.place import check_report
    from qkit.training.text import find

    check_report(out)
    engine = require(qkit.backend(backend), Builds)
    engine = engine.on(device) if device else engine
    named = overridden(qkit.recipe(recipe), skip_indivisible=skip_indivisible) if recipe else None
    others = tuple(overridden(qkit.recipe(name), skip_indivisible=skip_indivisible) for name in deploy_recipe or [])
    masters = masters or (newest_checkpoint(qat) if qat else None)
    sources = Sources(floats, named, others, ptq, qat, masters, longer)
    text = read_alike([floats, *(one for one in (ptq, qat, masters, longer) if one and not one.is_file())], data)
    rows = consecutive(text.tokens, length=length, windows=windows)
    place = device or "the default device"
    measurements = Measurements(out / FILE, setting_of(engine.name, place, floats, rows, installed()))
    with counting(len(rows) * sources.models, "windows") as tick, _keeping(measurements, out / FILE):

        def progress(row: str, windows: int) -> None:
            if not windows:
                errors.print(f"measuring {row}", highlight=False)
            tick(row, windows)

        found = compare(engine, sources, rows, progress=progress, measurements=measurements)
    source = describe_source(
        shlex.join(["qkit", *sys.argv[1:]]),
        backend=engine.name,
        device=place,
        files=list(map(str, find(data))),
        tokens_per_byte=text.tokens.size / text.nbytes,
    )
    heading = title or f"{floats.name} on {found.recipe}"
    written = write(out, found, source, title=heading)
    drawn = find_spec("matplotlib") is not None
    if drawn:
        from qkit.report.picture import draw

        draw(found, out / "report.png", title=heading)
    if as_json:
        print_json(json.loads(to_json(found, source)))
        return
    console.print(_table(found))
    _premiums(found)
    console.print(f"{written}: the page; report.json beside it has the numbers")
    if not drawn:
        console.print(f"no picture: {how_to_install(ENGINE)}", markup=False)


@contextmanager
def _keeping(measurements: "Measurements", file: Path) -> Iterator[None]:
    """Says on standard error what was measured, if the block ends before all of it was."""
    try:
        yield
    except BaseException:
        if measurements.found:
            said = "; ".join(f"{name} {one.evaluation.loss:.4f}" for name, one in measurements.found.items())
            errors.print(
                f"measured so far, in nats per token: {said}. {file} keeps them, and the same command goes on from there",
                highlight=False,
                soft_wrap=True,
            )
        raise


def _table(found: "Comparison") -> Table:
    from qkit.report.text import nats, nats_between, size

    columns = ("model", "nats per token", f"above {found.baseline}", "95 %", "perplexity", "KL from float")
    table = Table(*columns, "same token", "bits per weight", "size")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found.rows:
        above = ("", "") if row.name == found.baseline else (nats(row.above), nats_between(row.above))
        numbers = (
            f"{row.perplexity:.3f}",
            f"{row.kl:.5f}",
            f"{row.agreement:.1%}",
            f"{row.bits:.2f}",
            size(row.nbytes),
        )
        table.add_row(row.name, nats(row.loss), *above, *numbers)
    return table


def _premiums(found: "Comparison") -> None:
    from qkit.report.text import share, share_between, summary, turned, verdict, verdict_between

    if found.premiums:
        table = Table("on the grid", "compared", "nats per token", "95 %", "won back", "95 %")
        for column in table.columns[2:]:
            column.justify = "right"
        for one in found.premiums:
            for name, gain in one.training.items():
                cost, won = turned(gain), one.recovered[name]
                shares = (share(won), share_between(won))
                table.add_row(one.grid, f"QAT with {name}", verdict(cost), verdict_between(cost), *shares)
            if one.deployment:
                moved = (verdict(one.deployment), verdict_between(one.deployment))
                table.add_row(one.grid, f"QAT with QAT on {found.recipe}", *moved, "", "")
        console.print(table)
    for row in found.rows:
        if "fitted by" in row.source:
            console.print(f"{row.name}: {row.source}", highlight=False)
    if found.masters_equal:
        equal, numbers = found.masters_equal
        console.print(f"codes of {found.masters}, equal to those of the trained model: {equal:,} of {numbers:,}")
    console.print(summary(found))
