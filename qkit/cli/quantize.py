"""`qkit quantize MODEL OUT --recipe R`: quantizes a directory, and builds no model."""

import gc
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import qkit
from qkit.cli.completing import engine_names, recipe_names
from qkit.cli.console import Json, console, errors, print_json, read_size, size
from qkit.cli.opened import decoded
from qkit.cli.progress import showing
from qkit.engines.protocol import Arrays
from qkit.fitting.by_search import summary
from qkit.fitting.fits import Fit, Method
from qkit.overrides import check_ignored, overridden
from qkit.planning import TOWERS
from qkit.processes import cores
from qkit.storage.destination import Destination, check_directory, check_replaced_file, destination, existing_parent
from qkit.storage.parts import Part
from qkit.streaming.carry_out import check_apart, join_parts, quantize_directory, rows_of
from qkit.streaming.plan import Plan, make_plan

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A Hugging Face directory: safetensors and a config.json.", callback=decoded),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe, an alias or a TOML file.", autocompletion=recipe_names)
]
CopyCode = Annotated[
    bool, typer.Option("--copy-code", help="Copy the directory's Python files too. qkit never runs them.")
]
Untie = Annotated[
    bool,
    typer.Option(
        "--untie", help="Write a tied output head as a weight of its own, as vLLM wants it under -all recipes."
    ),
]
ShardSize = Annotated[str, typer.Option(help="The most bytes of tensors in one file, such as 5GB or 800MB.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Processes of the NumPy engine. The default: one for each core."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="A shell pattern for layers that stay in float, in quotes. Repeat for more."),
]
SkipIndivisible = Annotated[
    bool, typer.Option("--skip-indivisible", help="Leave layers in float that do not divide into groups.")
]
PartName = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Write part I of N of the weights files, beside OUT. Several processes or machines share one output so.",
    ),
]


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized directory, written whole or not at all.")],
    recipe: RecipeName,
    ignore: Ignore = None,
    skip_indivisible: SkipIndivisible = False,
    backend: Annotated[
        str, typer.Option(help="The engine. Every engine makes the same codes.", autocompletion=engine_names)
    ] = "numpy",
    device: Annotated[str, typer.Option(help="The device of the engine, such as cpu or cuda.")] = "cpu",
    copy_code: CopyCode = False,
    untie: Untie = False,
    shard_size: ShardSize = "5GB",
    jobs: Jobs = None,
    part: PartName = None,
    fit: Annotated[
        Method | None,
        typer.Option(
            "--fit", help="Choose scales, or codes too, that lose less than the rule's: search, solve, round."
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="STATS", help="Statistics of qkit calibrate. --fit solve and round need them."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="SVG", help="With --fit, a picture of each layer's error by the rule, and fitted."),
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Put OUT together when all its parts are written.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model's directory, tensor by tensor; interrupted, the same command goes on where it was."""
    mine = read_part(part) if part else None
    if stats and not fit:
        raise typer.BadParameter("--stats belongs to --fit: add --fit search or --fit solve")
    if picture and (not fit or part):
        raise typer.BadParameter(f"--picture {'wants all parts: add it with --finish' if fit else 'belongs to --fit'}")
    if picture:
        check_replaced_file(picture)
    how = Fit(fit, stats) if fit else None
    check_apart(out, model)
    place = check_directory(out)
    engine = qkit.backend(backend).on(device)
    chosen = overridden(qkit.recipe(recipe), ignore=ignore or (), skip_indivisible=skip_indivisible)
    plan = make_plan(model, chosen, shard_bytes=read_size(shard_size), copy_code=copy_code, untie=untie, fit=how)
    check_ignored(ignore or (), [row.path for row in plan.rows if row.path])
    warn(plan)
    nbytes = plan.output_bytes
    if mine or not finish:
        _write(plan, place, engine, jobs or cores(), mine, nbytes)
    if finish:
        join_parts(plan, out)
    if picture and how:
        _draw(plan, out, how, picture)
    if mine and not finish:
        files = mine.files(plan.layout)
        if as_json:
            print_json({"out": str(out), "part": str(mine), "files": list(files), "of": len(plan.layout.sizes)})
            return
        console.print(
            f"{out}: part {mine} is written, {len(files)} of {len(plan.layout.sizes)} weights files", highlight=False
        )
    elif as_json:
        print_json(_as_table(plan, out, nbytes))
    else:
        _report(plan, out, nbytes)


def warn(plan: Plan) -> None:
    """Prints to standard error: codes of another program, towers that stay in float, readers that will not open the output."""
    for note in plan.notes:
        errors.print(f"{plan.folder}: {note}", highlight=False, markup=False, soft_wrap=True)
    if plan.notes:
        errors.print(
            "warning: these weights are quantized twice, and carry the error of both; the float model gives better ones",
            highlight=False,
            soft_wrap=True,
        )
    towers = sum(row.reason == TOWERS for row in plan.rows)
    if towers:
        errors.print(f"{towers:,} layers are {TOWERS}", highlight=False, soft_wrap=True)
    if plan.fit and (text := summary(plan.by_search, plan.fit)):
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
    for one in plan.caveats:
        errors.print(f"warning: {one}", highlight=False, markup=False, soft_wrap=True)


def read_part(text: str) -> Part:
    """The part that `I/N` names.

    Raises:
        BadParameter: the text is no part.
    """
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is no part: write 1/4 to 4/4")
    return Part(int(match[1]), int(match[2]))


def _write(plan: Plan, place: Destination, engine: Arrays, workers: int, part: Part | None, nbytes: int) -> None:
    layout = plan.layout if part is None else plan.layout.only(part.files(plan.layout))
    if part is None:
        _check_room(nbytes, place)
    else:
        _check_room(sum(layout.sizes.values()), destination(part.folder(place.path)))
    gc.freeze()  # a collection in a forked worker would copy the pages of today's objects: a tenth of the time
    with showing(sum(row.stored.slot.nbytes for row in rows_of(plan, layout.places))) as tick:
        quantize_directory(plan, place.requested, engine=engine, workers=workers, tick=tick, part=part)


def _check_room(nbytes: int, place: Destination) -> None:
    """Refuses, before any work, an output that the disk has no room for."""
    aside = place.aside
    reusable = sum(entry.stat().st_blocks * 512 for entry in aside.iterdir()) if aside.exists() else 0
    home = place.path if place.mounted else existing_parent(place.path)
    free = shutil.disk_usage(home).free + reusable
    if nbytes > free:
        raise qkit.PlanError(
            f"{place.requested} needs {size(nbytes)}, and {home} has {size(free)} free: make room, or go elsewhere"
        )


def _as_table(plan: Plan, out: Path, nbytes: int) -> dict[str, Any]:
    return {
        "out": str(out),
        "layers": sum(bool(row.rule) for row in plan.rows),
        "bytes": nbytes,
        "bits_per_weight": plan.bits_per_weight,
        "not_copied": list(plan.left_behind),
        "warnings": [str(one) for one in plan.caveats],
    }


def _draw(plan: Plan, out: Path, fit: Fit, picture: Path) -> None:
    from qkit.report.fit_picture import draw_fit, layer_errors  # here, so that the command starts fast

    draw_fit(list(layer_errors(plan.folder, out, fit)), picture, title=f"{out.name}: the error of each layer's outputs")
    errors.print(f"{picture}: the errors of each layer, by the rule and fitted", highlight=False, soft_wrap=True)


def _report(plan: Plan, out: Path, nbytes: int) -> None:
    layers = sum(bool(row.rule) for row in plan.rows)
    written = f"{size(nbytes)}, {plan.bits_per_weight:.2f} bits per weight"
    console.print(f"{out}: {layers} layers quantized, {written}", highlight=False)
    if plan.left_behind:
        errors.print(f"not copied: {', '.join(plan.left_behind)}", highlight=False, soft_wrap=True)
