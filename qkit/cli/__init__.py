"""The command line, `qkit`. This is the only package that prints. Commands import a framework only if they need it."""

from qkit.startup import interruptible, uncollected

with interruptible(), uncollected():
    from qkit.cli.application import main

__all__ = ["main"]
