"""Where the command line prints: tables for people, JSON for machines, errors apart."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

PAPER = 140  #: columns where the output is not a terminal

#: No markup: what is printed is often the user's own text, and `*.[a-z]_proj` is a pattern. Color is given by `Text`.
console = Console(width=None if sys.stdout.isatty() else PAPER, markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


class Type(StrEnum):
    """`DType`, as Typer wants choices."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2))
