"""The codes of the experts of a model when it is converted."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from qkit.arrays import check
from qkit.engines.abilities import require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes, TrainsExperts
from qkit.engines.protocol import Modules
from qkit.experts import Codes, quantize_experts
from qkit.grid import Grid
from qkit.reference.learned import learned_codes
from qkit.rules import Rule


def pack_experts(engine: Modules, layer: Layer, rule: Rule, static: Mapping[str, NDArray[Any]]) -> Any:
    """The converted form of float or prepared experts: the codes of the grid's rule, or of the scales that they have learned.

    Raises:
        RangeError: a weight or a learned scale is not finite.
    """
    mixing = require(engine, Mixes)
    assert rule.weight is not None
    weights = mixing.experts(layer.module)
    for name, w in weights.items():
        check(engine, w, rule.weight, name=f"{layer.path}.{name}")
    if layer.stage == "prepared" and rule.scales == "learned":
        q = _learned_experts(engine, layer, rule.weight, weights)
    else:
        q = quantize_experts(weights, rule.weight, engine)
    return mixing.pack_experts(layer.module, q, rule, static=static)


def _learned_experts(engine: Modules, layer: Layer, grid: Grid, weights: Mapping[str, Any]) -> Codes:
    """The codes of each expert's projections on the scales that they have learned."""
    learned = require(engine, TrainsExperts).learned_experts(layer.module)
    out: Codes = {}
    for name, stack in weights.items():
        parameters = {key: engine.to_numpy(one) for key, one in learned[name].items()}
        out[name] = [
            learned_codes(
                engine.to_numpy(one),
                grid,
                {key: values[number] for key, values in parameters.items()},
                path=f"{layer.path}.{number}.{name}",
            )
            for number, one in enumerate(stack)
        ]
    return out
