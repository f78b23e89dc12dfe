"""The `qkit` application: its commands and its version."""

import os
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

import qkit
from qkit.cli.backends import backends
from qkit.cli.boundary import DEBUG, MEANINGS, run
from qkit.cli.calibrate import calibrate
from qkit.cli.compare import compare
from qkit.cli.console import show_warning
from qkit.cli.demo import demo
from qkit.cli.diff import diff
from qkit.cli.eval import eval_
from qkit.cli.export import export
from qkit.cli.groups import Grouped, example_of
from qkit.cli.import_ import import_
from qkit.cli.inspect import inspect
from qkit.cli.merge import merge
from qkit.cli.mlx_lora import mlx_lora
from qkit.cli.parity import parity
from qkit.cli.plan import plan
from qkit.cli.quantize import quantize
from qkit.cli.recipes import recipes
from qkit.cli.smooth import smooth
from qkit.cli.teach import teach
from qkit.cli.train import train
from qkit.cli.verify import verify
from qkit.cli.warmup import warmup

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
COMMANDS: dict[str, Callable[..., None]] = {
    "recipes": recipes,
    "plan": plan,
    "calibrate": calibrate,
    "smooth": smooth,
    "quantize": quantize,
    "train": train,
    "teach": teach,
    "merge": merge,
    "mlx-lora": mlx_lora,
    "eval": eval_,
    "compare": compare,
    "diff": diff,
    "inspect": inspect,
    "verify": verify,
    "export": export,
    "import": import_,
    "backends": backends,
    "parity": parity,
    "warmup": warmup,
    "demo": demo,
}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  #: mlx-lora gives options on to another command
for name, command in COMMANDS.items():
    settings = PASSED_ON if name == "mlx-lora" else {}
    application.command(name, epilog=example_of(name), context_settings=settings)(command)


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
