"""The `qkit` application: its commands, its version, and how it fails."""

import os
import sys
from typing import Annotated

import typer

import qkit
from qkit.cli.backends import backends
from qkit.cli.compare import compare
from qkit.cli.console import errors
from qkit.cli.demo import demo
from qkit.cli.diff import diff
from qkit.cli.eval import eval_
from qkit.cli.export import export
from qkit.cli.import_ import import_
from qkit.cli.inspect import inspect
from qkit.cli.merge import merge
from qkit.cli.parity import parity
from qkit.cli.plan import plan
from qkit.cli.quantize import quantize
from qkit.cli.recipes import recipes
from qkit.cli.teach import teach
from qkit.cli.train import train
from qkit.cli.verify import verify

#: By the error's class, the nearest first. 0 is success, 1 mismatches that were asked for, 2 wrong usage.
EXIT_CODES = {
    qkit.LockedError: 4,
    qkit.PlanError: 5,
    qkit.VerificationError: 6,
    qkit.QkitError: 3,
    Exception: 70,  # a defect of qkit, or of the system
}
DEBUG = "QKIT_DEBUG"

application = typer.Typer(
    name="qkit",
    help="Train on the grid you ship, prove it, run it anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (backends, recipes, plan, quantize, inspect, verify, parity, train, teach, demo):
    application.command()(command)
application.command()(export)
application.command("import")(import_)
application.command()(diff)
application.command()(merge)
application.command("eval")(eval_)
application.command()(compare)


def main() -> None:
    """Runs the command line; a failure is one line on standard error and a code of `EXIT_CODES`."""
    try:
        application(prog_name="qkit")
    except qkit.QkitError as error:
        _fail(str(error), error)
    except OSError as error:  # a full disk, a folder that may not be written: the system's own words
        _fail(str(error), error)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} ({DEBUG}=1 shows where)", error)


def _fail(message: str, error: Exception) -> None:
    if os.environ.get(DEBUG):
        raise error
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
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
