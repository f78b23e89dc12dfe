"""The command line, `qkit`: the only package that prints; a framework is imported only where it is needed."""

from qkit.startup import interruptible

with interruptible():
    from qkit.cli.application import main

__all__ = ["main"]
