"""Arguments that name a model: a GGUF file stands for the directory that `qkit import` makes of it, or for its float model."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from qkit.cli.console import errors
from qkit.storage.other_models import GGUF

if TYPE_CHECKING:
    from qkit.artifact.snapshot import Snapshot


def opened(context: typer.Context, given: Path) -> Path:
    """`given`; of a GGUF file, a directory with the model, which lasts as long as the command."""
    return _directory(context, given, decodes=False) if _is_gguf(context, given) else given


def all_opened(context: typer.Context, given: list[Path]) -> list[Path]:
    """As `opened`, of each."""
    return [opened(context, one) for one in given]


def decoded(context: typer.Context, given: Path) -> Path:
    """`given`; of a GGUF file, a directory with its values as a float model, for commands that quantize them."""
    return _directory(context, given, decodes=True) if _is_gguf(context, given) else given


def values_of(context: typer.Context, given: Path) -> Path:
    """As `decoded`; of any model that another program quantized, too."""
    from qkit.exchange.import_model import open_model  # here, so that other commands start fast

    if context.resilient_parsing or not given.is_dir():
        return decoded(context, given)
    source = open_model(given)
    return _written(context, given, source, decodes=True) if source.foreign and source.weights else given


def _is_gguf(context: typer.Context, given: Path) -> bool:
    named = isinstance(given, Path) and given.name.lower().endswith(GGUF)
    return named and not context.resilient_parsing and given.is_file()


def _directory(context: typer.Context, file: Path, *, decodes: bool) -> Path:
    from qkit.exchange.import_model import read_model  # here, so that other commands start fast

    return _written(context, file, read_model(file), decodes=decodes)


def _written(context: typer.Context, given: Path, source: "Snapshot", *, decodes: bool) -> Path:
    """A directory of the model, which is removed when the command ends."""
    from qkit.exchange.export_model import export_dense  # here, as the next, so that other commands start fast
    from qkit.exchange.import_model import to_artifact
    from qkit.exchange.write_model import weights_only

    twice = f"{len(source.weights)} weights are quantized already, and their values are quantized again"
    for note in (*source.notes, *([twice] if decodes and source.weights else [])):
        errors.print(f"{given}: {note}", highlight=False, markup=False, soft_wrap=True)
    place = Path(context.with_resource(TemporaryDirectory(prefix="qkit-"))) / given.name
    if decodes:
        export_dense(weights_only(source), place)
    else:
        to_artifact(source, place)
    return place
