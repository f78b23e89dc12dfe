"""Modules that say their grids where a model is printed."""

import mlx.nn as nn

from qkit.engines.layer import grids_of


class Shown(nn.Module):
    """A module with a `rule`, whose grids are the last part of its `repr`."""

    def _extra_repr(self) -> str:
        rule = self.__dict__.get("rule")
        return ", ".join(filter(None, (super()._extra_repr(), grids_of(rule) if rule else "")))
