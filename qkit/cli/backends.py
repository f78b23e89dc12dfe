"""`qkit backends`: what is installed, and whether it can be used here."""

from dataclasses import asdict

from rich.table import Table

import qkit
from qkit.cli.console import Json, console, print_json


def backends(as_json: Json = False) -> None:
    """List the backends, ready or not, and why not."""
    found = qkit.backends()
    if as_json:
        print_json([asdict(status) for status in found])
        return
    table = Table("name", "framework", "ready", "reason")
    for status in found:
        ready = "[green]yes[/]" if status.ready else "[red]no[/]"
        table.add_row(status.name, status.framework, ready, status.reason.replace("[", r"\["))
    console.print(table)
