"""`qkit inspect DIR`: the grids, layers and sizes in a directory of weights."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qkit.artifact.inspect import Group, Inspection, inspect_directory
from qkit.artifact.metadata import fit_text
from qkit.artifact.servers import VLLM
from qkit.cli.console import All, Json, console, print_json, size
from qkit.path_patterns import collapse
from qkit.rules import rule_table

FEW = 6  #: the most patterns that a line lists in full


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact, or any model's directory.")],
    all_rows: All = False,
    as_json: Json = False,
) -> None:
    """List the formats, layers and sizes in a directory, and the tensors that are left alone. Reads headers only."""
    found = inspect_directory(folder)
    if as_json:
        print_json(_as_table(found))
        return
    if found.groups:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("layers", "count", "kind", "weight", "activation", "stored as", "bits"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "count" else "left")
        for group in found.groups:
            rule, bits = group.stored.rule, f"{8 * group.nbytes / group.numbers:.2f}"
            cells = (rule.kind, str(rule.weight), str(rule.activation or ""), group.format, bits)
            paths = group.stored.paths
            for name, count in (dict.fromkeys(paths, 1) if all_rows else collapse(paths)).items():
                table.add_row(name, f"{count:,}", *cells)
        console.print(table)
    elif found.foreign:
        console.print(_foreign_table(found, all_rows))
    else:
        console.print("no quantized layers")
    if found.left_alone:
        names = list(found.left_alone if all_rows else collapse(found.left_alone))
        more = "" if all_rows or len(names) <= FEW else f" ... ({len(found.left_alone)})"
        console.print(f"left alone: {', '.join(names[:FEW] if more else names)}{more}", highlight=False)
    if found.tied:
        console.print(f"{found.tied} is also the output head", highlight=False)
    if found.fit:
        console.print(fit_text(found.fit), highlight=False, markup=False)
    for text in found.served:
        console.print(f"{VLLM}: {text}", highlight=False, markup=False)
    files = ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in found.files.items())
    console.print(f"{found.tensors} tensors, {found.bits_per_weight:.2f} bits per weight, in {files}", highlight=False)


def _foreign_table(found: Inspection, all_rows: bool) -> Table:
    """The weights that another program quantized."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("layers", "count", "kind", "stored as", "bits"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "count" else "left")
    for group in found.foreign:
        names = dict.fromkeys(group.paths, 1) if all_rows else collapse(group.paths)
        for name, count in names.items():
            table.add_row(name, f"{count:,}", group.kind, group.form, f"{8 * group.nbytes / group.numbers:.2f}")
    return table


def _as_table(found: Inspection) -> dict[str, Any]:
    return {
        "rules": [_group_table(group) for group in found.groups],
        "foreign": [
            {"form": one.form, "kind": one.kind, "layers": list(one.paths), "bytes": one.nbytes, "numbers": one.numbers}
            for one in found.foreign
        ],
        "left_alone": list(found.left_alone),
        "tied_head": found.tied or None,
        "fit": found.fit,
        "warnings": [f"{VLLM}: {text}" for text in found.served],
        "files": dict(found.files),
        "tensors": found.tensors,
        "bits_per_weight": found.bits_per_weight,
    }


def _group_table(group: Group) -> dict[str, Any]:
    rule = {key: value for key, value in rule_table(group.stored.rule).items() if key != "match"}
    sizes = {"bytes": group.nbytes, "bits_per_weight": 8 * group.nbytes / group.numbers}
    return {**rule, "format": group.format, "dtype": group.stored.dtype, "layers": list(group.stored.paths), **sizes}
