"""`qkit verify DIR`: compares the bytes of a directory with the digests that qkit wrote."""

from pathlib import Path
from typing import Annotated

import typer

import qkit
from qkit.cli.console import Json, console, errors, print_json
from qkit.cli.opened import opened


def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A directory that `qkit quantize` or `qkit.save` wrote.", callback=opened),
    ],
    as_json: Json = False,
) -> None:
    """Read every byte of an artifact, and compare it with the digests that were written with it."""
    from qkit.artifact.metadata import fit_of, fit_text  # here, as the next, so that other commands start fast
    from qkit.artifact.verify import verify as find_problems
    from qkit.processes import cores
    from qkit.storage.read import read_folder

    problems = list(find_problems(folder, workers=cores()))
    fit = None if problems else fit_of(read_folder(folder)[1])
    if as_json:
        said = {"folder": str(folder), "whole": not problems, "problems": [str(one) for one in problems]}
        print_json(said | ({"fit": fit} if fit else {}))
    for problem in problems:
        errors.print(str(problem), highlight=False, soft_wrap=True)
    if problems:
        raise qkit.VerificationError(
            f"{folder} is not what was written: {len(problems)} problem(s), named above: fetch or quantize it again"
        )
    if not as_json:
        console.print(f"{folder} is whole{f': {fit_text(fit)}' if fit else ''}", highlight=False)
