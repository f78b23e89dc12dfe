"""The output of the command line: tables for people, JSON for machines, and errors on their own stream."""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

PAPER = 140  #: columns of an output that is not a terminal, where COLUMNS does not say
NAME = 32  #: the least columns for the names of layers, the longest of which in a Llama have as many


@contextmanager
def to_output() -> Iterator[None]:
    """Adds the name of standard output to errors of writing it, as on a full disk: the system names files only."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, error.filename or "standard output") from None


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does."""
        with to_output():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Leaves the error to `qkit.cli.boundary`; rich would end the process with 1, which means differences."""
        raise  # rich calls this method while it handles the error


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


#: No markup: the output often has the user's own text, and `*.[a-z]_proj` is a pattern. `Text` gives color.
console = _Console(width=None if _is_terminal() or "COLUMNS" in os.environ else PAPER, markup=False, emoji=False)
errors = _Console(stderr=True, markup=False, emoji=False)


class Type(StrEnum):
    """The choices of `DType`, as an enum for Typer."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
All = Annotated[bool, typer.Option("--all", help="A row for each tensor or layer, in place of patterns.")]


def print_json(value: Any) -> None:
    """Prints `value` as JSON on standard output."""
    with to_output():
        typer.echo(json.dumps(value, indent=2))


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten: 4.2 GB."""
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= many:
            return f"{nbytes / many:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def read_size(text: str) -> int:
    """The inverse of `size`.

    Raises:
        BadParameter: the text is no size, or the size is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB|kB|)", text.strip(), re.IGNORECASE)
    nbytes = int(float(match[1]) * {"gb": 1e9, "mb": 1e6, "kb": 1e3, "": 1}[match[2].lower()]) if match else 0
    if not nbytes:
        raise typer.BadParameter(f"{text!r} is no size: write 5GB or 800MB")
    return nbytes


def show_warning(message: Warning | str, category: type[Warning], filename: str, *more: Any, **options: Any) -> None:
    """Shows a warning of qkit's as one line on standard error; those of libraries are for programmers, as Python has them."""
    if category.__module__ == "qkit.errors":
        errors.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)
    else:
        errors.print(
            warnings.formatwarning(message, category, filename, more[0]), highlight=False, markup=False, end=""
        )
