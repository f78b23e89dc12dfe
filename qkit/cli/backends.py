"""`qkit backends`: what is installed, and whether it can be used here."""

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

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
        ready = Text("yes", "green") if status.ready else Text("no", "red")
        table.add_row(status.name, status.framework, ready, status.reason)
    console.print(table)
