"""`qkit backends`: which engines are ready, and what each does with every recipe."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

import qkit
from qkit.cli.console import Json, Type, console, errors, print_json
from qkit.engines.protocol import Arrays


def backends(
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Try every recipe on every engine that is ready: native, decoded or missing."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to probe, such as cpu or cuda.")] = None,
    dtype: Annotated[Type, typer.Option(help="Type of the layer that is probed.")] = Type.bfloat16,
    as_json: Json = False,
) -> None:
    """List the backends, ready or not, and why not; with --probe, try every recipe on them."""
    found = qkit.backends()
    if probe:
        from qkit.cli.probing import probe_all, show_probes  # here, so that other commands start fast

        ready = _load(status.name for status in found if status.ready)
        probes = probe_all(ready, map(qkit.recipe, qkit.recipes()), dtypes=[dtype.value], device=device)
        if as_json:
            print_json([asdict(one) | {"exact": one.exact} for one in probes])
        else:
            show_probes(probes)
        return
    if as_json:
        print_json([asdict(status) for status in found])
        return
    table = Table("name", "framework", "ready", "reason")
    for status in found:
        ready_or_not = Text("yes", "green") if status.ready else Text("no", "red")
        table.add_row(status.name, status.framework, ready_or_not, status.reason)
    console.print(table)


def _load(names: Iterable[str]) -> list[Arrays]:
    """The engines that load. Names the others on standard error."""
    engines = []
    for name in names:
        try:
            engines.append(qkit.backend(name))
        except qkit.BackendError as error:
            errors.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
    return engines
