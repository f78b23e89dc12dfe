"""Modules that say their grids where a model is printed."""

from torch import nn

from qkit.engines.layer import grids_of


class Shown(nn.Module):
    """A module with a `rule`, whose grids are the last part of its `repr`."""

    def extra_repr(self) -> str:
        """As the module itself has it, and the grids."""
        rule = self.__dict__.get("rule")
        return ", ".join(filter(None, (super().extra_repr(), grids_of(rule) if rule else "")))
