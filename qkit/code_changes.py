"""Whether training changed the codes of a model: checksums of the codes that it would have if it were converted now."""

import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkit.conversion import learned_expert_codes
from qkit.engines.abilities import offers, require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Adapts, Arrays, Modules
from qkit.errors import UnchangedWarning
from qkit.experts import quantize_experts
from qkit.pipeline import surgeon
from qkit.reference.learned import learned_codes, stored_names
from qkit.rules import Rule

Sums = Mapping[str, int]


def code_sums(model: Any, *, backend: str | Arrays | None = None) -> dict[str, int]:
    """A checksum of the codes of each prepared or adapted layer of `model`, by path. Adapters count as merged.

    Where scales train alone, it is one of scales.
    """
    engine = surgeon(model, backend)
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared" or layer.adapter]
    return {layer.path: _sum(engine, model, layer) for layer in layers if not layer.tied and not layer.sharded}


def sum_of_codes(engine: Arrays, w: Any, rule: Rule | None) -> int:
    """A checksum of the codes of `w` [outputs, inputs] under `rule`, whose scales are not learned."""
    assert rule is not None
    assert rule.weight is not None
    return zlib.crc32(np.ascontiguousarray(engine.to_numpy(engine.quantize(w, rule.weight).codes)).data)


def count_changes(before: Sums, after: Sums) -> int:
    """How many layers have other codes than `before`."""
    return sum(before[path] != after[path] for path in before.keys() & after.keys())


def warn_of_no_change(before: Sums, after: Sums, *, rate: float, stacklevel: int) -> None:
    """Warns if there are layers, and none has other codes than `before`. `rate` is the learning rate, for the message."""
    if before and not count_changes(before, after):
        warnings.warn(
            f"training changed no code of {len(before)} layers: quantized, this is the model that it began with; raise the "
            f"learning rate (now {rate:g}), or train longer",
            UnchangedWarning,
            stacklevel=stacklevel + 1,
        )


def _sum(engine: Modules, model: Any, layer: Layer) -> int:
    assert layer.rule is not None
    assert layer.rule.weight is not None
    module = layer.module
    if layer.adapter and offers(engine, Adapts):
        module = engine.merge_adapter(module)
    if layer.kind == "experts":
        return _sum_of_experts(require(engine, Mixes), module, layer)
    if layer.stage == "converted":
        codes = engine.to_numpy(engine.unpack(module).codes)
    elif layer.rule.scales != "rule":
        tensors, prefix = engine.tensors(model), f"{layer.path}." if layer.path else ""
        mine = stored_names(layer.rule.weight, layer.rule.scales)
        ranges = {name: engine.to_numpy(tensors[prefix + name]) for name in mine}
        q = learned_codes(engine.to_numpy(engine.weight(module)), layer.rule.weight, ranges, path=layer.path)
        codes = q.scales if layer.rule.scales == "alone" else q.codes
    else:
        return sum_of_codes(engine, engine.weight(module), layer.rule)
    return zlib.crc32(np.ascontiguousarray(codes).data)


def _sum_of_experts(engine: Mixes, module: Any, layer: Layer) -> int:
    assert layer.rule is not None
    assert layer.rule.weight is not None
    if layer.stage == "converted":
        found = engine.unpack_experts(module)
    elif layer.rule.scales != "rule":
        found = learned_expert_codes(engine, layer, layer.rule.weight, engine.experts(module))
    else:
        found = quantize_experts(engine.experts(module), layer.rule.weight, engine)
    codes = (q.codes for each in found.values() for q in each)
    arrays = (one if isinstance(one, np.ndarray) else engine.to_numpy(one) for one in codes)
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))
