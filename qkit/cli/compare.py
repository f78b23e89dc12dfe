"""`qkit compare FLOAT --recipe R`: the gain of training on a grid, and the cost of another one. The work is in `qkit.report`."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import qkit
from qkit.cli.console import console, errors
from qkit.cli.eval import Data, Device, Engine, Length, Windows
from qkit.cli.progress import counting
from qkit.engines.abilities import require
from qkit.engines.protocol import Builds
from qkit.installation import ENGINE, how_to_install

if TYPE_CHECKING:
    from qkit.report import Comparison


def compare(
    floats: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model's directory.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Where report.html, report.json and report.png go.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, an alias or a TOML file. Left out: the rules of --qat's layers.",
        ),
    ] = None,
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
) -> None:
    """Compare a model in float, quantized, trained on the grid, and deployed on another grid: table, picture and page."""
    from qkit.evaluation import consecutive, read_alike  # here, so that other commands start fast
    from qkit.report import Sources, compare, describe_source, write
    from qkit.report.master_weights import newest_checkpoint
    from qkit.report.place import check_report
    from qkit.training.text import find

    check_report(out)
    engine = require(qkit.backend(backend), Builds)
    engine = engine.on(device) if device else engine
    named = qkit.recipe(recipe) if recipe else None
    others = tuple(map(qkit.recipe, deploy_recipe or []))
    masters = masters or (newest_checkpoint(qat) if qat else None)
    sources = Sources(floats, named, others, ptq, qat, masters, longer)
    text = read_alike([floats, *(one for one in (ptq, qat, masters, longer) if one and not one.is_file())], data)
    rows = consecutive(text.tokens, length=length, windows=windows)
    with counting(len(rows) * sources.models, "windows") as tick:

        def progress(row: str, windows: int) -> None:
            if not windows:
                errors.print(f"measuring {row}", highlight=False)
            tick(row, windows)

        found = compare(engine, sources, rows, progress=progress)
    source = describe_source(
        shlex.join(["qkit", *sys.argv[1:]]),
        backend=engine.name,
        device=device or "the default device",
        files=list(map(str, find(data))),
        tokens_per_byte=text.tokens.size / text.nbytes,
    )
    heading = title or f"{floats.name} on {found.recipe}"
    written = write(out, found, source, title=heading)
    console.print(_table(found))
    _premiums(found)
    console.print(f"{written}: the page; report.json beside it has the numbers")
    if find_spec("matplotlib"):
        from qkit.report.picture import draw

        draw(found, out / "report.png", title=heading)
    else:
        console.print(f"no picture: {how_to_install(ENGINE)}", markup=False)


def _table(found: "Comparison") -> Table:
    from qkit.report.text import nats, nats_between

    table = Table(
        "model", "nats per token", f"above {found.baseline}", "95 %", "perplexity", "KL from float", "same token"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found.rows:
        above = ("", "") if row.name == found.baseline else (nats(row.above), nats_between(row.above))
        numbers = (f"{row.perplexity:.3f}", f"{row.kl:.5f}", f"{row.agreement:.1%}")
        table.add_row(row.name, nats(row.loss), *above, *numbers)
    return table


def _premiums(found: "Comparison") -> None:
    from qkit.report.text import nats, nats_between, share, share_between, summary

    if found.premiums:
        table = Table("deployed on", "training premium", "95 %", "deployment premium", "95 %", "recovered", "95 %")
        for column in table.columns[1:]:
            column.justify = "right"
        for one in found.premiums:
            moved = (nats(one.deployment), nats_between(one.deployment)) if one.deployment else ("", "")
            training = (nats(one.training), nats_between(one.training))
            table.add_row(one.grid, *training, *moved, share(one.recovered), share_between(one.recovered))
        console.print(table)
    if found.masters_equal:
        equal, numbers = found.masters_equal
        console.print(f"codes of {found.masters}, equal to those of the trained model: {equal:,} of {numbers:,}")
    console.print(summary(found))
