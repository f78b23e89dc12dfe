"""Attributes of prepared layers that follow from rule and mode: computed where these change, and read at each call."""

from typing import Any

from qkit.rules import Rule
from qkit_torchao.cache import codes
from qkit_torchao.layers import products, sharded


def reserve_codes(layer: Any) -> None:
    """Computes codes before a graph is captured, for layers that multiply them; see `codes.of`."""
    if layer.weight.is_cuda and layer.kind and not sharded.is_sharded(layer):
        codes.of(layer.weight, layer.weight_grid)


def put_on(layer: Any, rule: Rule) -> None:
    """Puts `layer` on the grids of `rule`."""
    assert rule.weight is not None
    layer.rule, layer.grid_name, layer.kind = rule, str(rule.weight), products.kind(rule.weight, rule.activation)
    layer.slot_names, layer.fits = {"input": str(rule.activation), "output": str(rule.output)}, {}
    layer.asked = False


def settle(layer: Any) -> None:
    """Computes `simple` and `dynamic`, which do not change between two calls."""
    dynamic = layer.mode == "on" and layer.rule.range == "dynamic"
    layer.simple = dynamic and not (layer.frozen or layer.kind)
    layer.dynamic = layer.rule.output is None and (dynamic or layer.rule.activation is None)
