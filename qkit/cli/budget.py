"""`qkit plan MODEL --budget B --grids R,R --data FILES`: a recipe that spends a budget. The work is in `qkit.budget`."""

import re
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

import qkit
from qkit.budget import Allotment, Budget, allot
from qkit.cli.console import errors, read_size, size
from qkit.engines.abilities import require
from qkit.engines.protocol import Builds
from qkit.fitting.fits import Fit
from qkit.rules import Recipe, grid_table


def print_budget(
    model: Path,
    *,
    budget: str,
    grids: str,
    data: list[str],
    stats: Path | None,
    exact: bool,
    length: int,
    windows: int,
    seed: int,
    backend: str,
    device: str,
) -> None:
    """Prints the recipe as TOML, and a sentence on it to standard error.

    Raises:
        BadParameter: an option is missing, or no budget.
        PlanError: see `qkit.budget.allot`.
    """
    from qkit.calibration import calibrate  # here, so that other commands start fast
    from qkit.evaluation import consecutive, read_alike

    if not grids or not data:
        raise typer.BadParameter("--budget needs --grids, such as int2-g32,int3-g32,int4-g32, and --data")
    amount = read_budget(budget)
    recipes = [qkit.recipe(name.strip()) for name in grids.split(",") if name.strip()]
    engine = require(qkit.backend(backend), Builds).on(device)
    rows = consecutive(read_alike([model], data).tokens, length=length - 1, windows=windows)
    with ExitStack() as stack:
        if stats is None:
            stats = Path(stack.enter_context(TemporaryDirectory())) / "stats"
            calibrate(model, stats, rows, engine=engine)
        found = allot(model, recipes, amount, rows, engine=engine, fit=Fit("solve", stats), exact=exact, seed=seed)
    typer.echo(as_toml(found.recipe), nl=False)
    errors.print(told(found), highlight=False, soft_wrap=True)


def read_budget(text: str) -> Budget:
    """The budget that a text such as `3.5bpw` or `8GB` names.

    Raises:
        BadParameter: the text is no budget.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*bpw", text.strip(), re.IGNORECASE)
    if match and float(match[1]) > 0:
        return Budget(float(match[1]), "bpw")
    if match or re.fullmatch(r"[0-9]*\.[0-9]*", text.strip()):
        raise typer.BadParameter(f"{text!r} is no budget: write bits per quantized weight, 3.5bpw, or a size, 8GB")
    return Budget(read_size(text), "bytes")


def as_toml(recipe: Recipe) -> str:
    """The text of a file that reads as `recipe`, whose rules differ in their grids and patterns alone."""
    lines = ["schema = 1", f"version = {recipe.version}", f'summary = "{recipe.summary}"']
    for rule in recipe.rules:
        if rule.weight and f"[grids.{rule.weight}]" not in lines:
            lines += ["", f"[grids.{rule.weight}]", *(f"{k} = {_text(v)}" for k, v in grid_table(rule.weight).items())]
        if rule.activation and f"[grids.{rule.activation}]" not in lines:
            table = grid_table(rule.activation)
            lines += ["", f"[grids.{rule.activation}]", *(f"{k} = {_text(v)}" for k, v in table.items())]
    for rule in recipe.rules:
        lines += ["", "[[rules]]", "match = [", *(f'  "{path}",' for path in rule.match), "]"]
        lines += [f'kind = "{rule.kind}"', f'weight = "{rule.weight}"']
        lines += [f'activation = "{rule.activation}"'] if rule.activation else []
    return "\n".join(lines) + "\n"


def told(found: Allotment) -> str:
    """A sentence on the choice."""
    each = ", ".join(f"{len(rule.match)} on {rule.weight}" for rule in found.recipe.rules)
    return (
        f"{found.bits:.4f} bits per quantized weight, {size(found.plan.output_bytes)} in all: layers {each}; estimated harm "
        f"{found.harm:.3g} nats a token"
    )


def _text(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'
