"""`qkit inspect DIR`: the grids, layers and sizes in a directory of weights."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qkit.artifact.inspect import Group, Inspection, inspect_directory
from qkit.artifact.metadata import fit_text
from qkit.artifact.servers import VLLM
from qkit.cli.console import NAME, All, Json, console, print_json, size
from qkit.cli.opened import opened
from qkit.path_patterns import collapse
from qkit.rules import rule_table

FEW = 6  #: the most patterns that a line lists in full


def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An artifact, any model's directory, or a GGUF file.", callback=opened)
    ],
    all_rows: All = False,
    as_json: Json = False,
) -> None:
    """List the formats, layers and sizes in a directory, and the tensors that are left alone. Reads headers only."""
    found = inspect_directory(folder)
    if as_json:
        print_json(_as_table(found))
        return
    if found.groups:
        rows = []
        for group in found.groups:
            rule, bits = group.stored.rule, f"{8 * group.nbytes / group.numbers:.2f}"
            cells = {"kind": rule.kind, "weight": str(rule.weight), "activation": str(rule.activation or "")}
            cells |= {"stored as": group.format, "bits": bits}
            paths = group.stored.paths
            for name, count in (dict.fromkeys(paths, 1) if all_rows else collapse(paths)).items():
                rows.append({"layers": name, "count": f"{count:,}", **cells})
        _print_rows(rows, keep=("layers", "count", "weight", "bits"))
    elif found.foreign:
        _print_rows(_foreign_rows(found, all_rows), keep=("layers", "count", "stored as", "bits"))
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


def _foreign_rows(found: Inspection, all_rows: bool) -> list[dict[str, str]]:
    """The weights that another program quantized."""
    rows = []
    for group in found.foreign:
        names = dict.fromkeys(group.paths, 1) if all_rows else collapse(group.paths)
        cells = {"kind": group.kind, "stored as": group.form, "bits": f"{8 * group.nbytes / group.numbers:.2f}"}
        rows += [{"layers": name, "count": f"{count:,}", **cells} for name, count in names.items()]
    return rows


def _print_rows(rows: list[dict[str, str]], *, keep: tuple[str, ...]) -> None:
    """Prints a table. Columns that say the same of all layers are a line below it, but for those in `keep`."""
    same = {
        name: value for name, value in rows[0].items() if name not in keep and all(row[name] == value for row in rows)
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (name for name in rows[0] if name not in same):
        right, least = heading in ("count", "bits"), NAME if heading == "layers" else None
        table.add_column(heading, overflow="fold", justify="right" if right else "left", min_width=least)
    for row in rows:
        table.add_row(*(value for name, value in row.items() if name not in same))
    console.print(table)
    if told := ", ".join(f"{name} {value}" for name, value in same.items() if value):
        console.print(f"all layers: {told}", highlight=False)


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
