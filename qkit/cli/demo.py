"""`qkit demo`: the main job from end to end, shown as it happens. The work is in `qkit.demo.run`."""

from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qkit.cli.completing import engine_names, recipe_names
from qkit.cli.console import Json, console, errors, print_json
from qkit.installation import ENGINE, how_to_install

if TYPE_CHECKING:
    from qkit.demo.run import Result


def demo(
    backend: Annotated[
        str | None,
        typer.Option(
            help="The engine. Left out: torchao or mlx, the first that is ready.", autocompletion=engine_names
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the artifact, the report and the picture go.")] = Path("qkit-demo"),
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="A recipe, an alias or a TOML file, to train for.", autocompletion=recipe_names
        ),
    ] = "int2-g64",
    as_json: Json = False,
) -> None:
    """Train a small Llama, quantize it, train it on its grid, open it on another engine: three minutes."""
    from qkit.demo.preset import PRESETS
    from qkit.demo.run import run  # here, so that other commands start fast

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[loss]}", markup=False),
    )
    with ExitStack() as stack:
        bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors if as_json else console)
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            if not tasks:
                stack.enter_context(bars)  # not before: a refusal leaves no empty lines
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"training, {stage}", total=steps, loss="")
            bars.update(tasks[stage], completed=step, loss=f"loss {loss:.3f}")

        result = run(backend=backend, recipe=recipe, folder=out, progress=progress)
    drawn = find_spec("matplotlib") is not None
    if drawn:
        from qkit.demo.picture import draw

        draw(result, out / "losses.png")
    if as_json:
        print_json({**asdict(result), "recovered": result.recovered})
        return
    console.print(_table(result))
    if result.backend in PRESETS:
        console.print(f"a smaller model than on other backends: {result.backend} is slow on a Linux CPU")
    console.print(f"{out / 'quantized'}: the artifact, a Hugging Face directory in compressed-tensors layout")
    if (out / "mlx").exists():
        console.print(f"{out / 'mlx'}: the same codes for mlx-lm")
    console.print(
        f"{out / 'report.html'}: the comparison as a page, with its charts; report.json beside it has the numbers"
    )
    picture = f"{out / 'losses.png'}: the loss curves" if drawn else f"no picture: {how_to_install(ENGINE)}"
    console.print(picture, markup=False)


def _table(result: "Result") -> Table:
    title = f"{result.recipe} on {result.backend}: a Llama of {result.parameters:,} parameters, Python's own source, byte by byte"
    table = Table("", "", title=title, show_header=False, title_justify="left")
    other = f"not available: {result.other_obstacle}"
    if result.other_loss is not None:
        other = f"{result.other_loss:.4f} (differs by {abs(result.other_loss - result.qat_loss):.1e})"
    recovered = "nothing to recover"
    if result.recovered is not None:
        recovered = f"{result.recovered:.0%} (both trained as long)"
    for name, value in (
        ("held-out loss, float", f"{result.float_loss:.4f} nats per byte"),
        ("  quantized without training (PTQ)", f"{result.ptq_loss:.4f}"),
        ("held-out loss, float, trained longer", f"{result.longer_float_loss:.4f}"),
        ("  quantized without training (PTQ)", f"{result.longer_ptq_loss:.4f}"),
        ("held-out loss, trained as long on the grid (QAT)", f"{result.qat_loss:.4f}"),
        *([(f"  the same weights on {result.elsewhere[0]}", f"{result.elsewhere[1]:.4f}")] if result.elsewhere else []),
        ("share of the PTQ loss recovered", recovered),
        ("bits per weight, embedding and head included", f"{result.bits_per_weight:.2f}"),
        (
            f"codes and scales equal on {', '.join(result.engines)}",
            f"{result.codes_equal:,} of {result.codes_compared:,}",
        ),
        ("largest logit difference, prepared to converted", f"{result.forward_difference:g}"),
        (f"held-out loss of the artifact on {result.other or 'another engine'}", other),
        *((f"  in {reader}, without qkit", _compared(loss, result)) for reader, loss in result.outside.items()),
    ):
        table.add_row(name, value)
    return table


def _compared(loss: float | str, result: "Result") -> str:
    """A loss and its distance from that of the trained model; or the reason why there is none."""
    return (
        f"not available: {loss}"
        if isinstance(loss, str)
        else f"{loss:.4f} (differs by {abs(loss - result.qat_loss):.1e})"
    )
