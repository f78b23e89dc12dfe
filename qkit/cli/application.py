"""The `qkit` application: its commands, its version, and how it fails."""

import os
import sys
from typing import Annotated

import typer

import qkit
from qkit.cli.backends import backends
from qkit.cli.console import errors
from qkit.cli.demo import demo
from qkit.cli.parity import parity
from qkit.cli.recipes import recipes

BAD_INPUT = 3
UNEXPECTED = 4
DEBUG = "QKIT_DEBUG"

application = typer.Typer(
    name="qkit",
    help="Train on the grid you ship, prove it, run it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (backends, recipes, parity, demo):
    application.command()(command)


def main() -> None:
    """Runs the command line.

    Exit codes: 0; 1 mismatches; 2 usage; 3 bad input (`QkitError`); 4 anything unexpected.
    """
    try:
        application()
    except qkit.QkitError as error:
        _fail(str(error), code=BAD_INPUT, error=error)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} ({DEBUG}=1 shows where)", code=UNEXPECTED, error=error)


def _fail(message: str, *, code: int, error: Exception) -> None:
    if os.environ.get(DEBUG):
        raise error
    errors.print(f"qkit: {' '.join(message.split())}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qkit {qkit.__version__}")
        raise typer.Exit


@application.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"
