"""The `qkit` application: its options, and the version. Its commands are in `qkit.cli.groups`."""

import os
import warnings
from typing import Annotated

import typer

import qkit
from qkit.cli.boundary import DEBUG, MEANINGS, run
from qkit.cli.console import show_warning
from qkit.cli.groups import Grouped

EPILOG = "Exit codes: " + ". ".join(f"{code}: {meaning}" for code, meaning in MEANINGS.items()) + "."

application = typer.Typer(
    name="qkit",
    cls=Grouped,
    help="Train on the grid you ship, prove it, run it anywhere.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Runs the command line and ends the process; a failure is one line on standard error and an exit code."""
    warnings.showwarning = show_warning
    run(lambda: application(prog_name="qkit"))


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
