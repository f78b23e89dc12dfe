"""probe: one layer of a recipe prepared, converted and run on an engine, and its codes and outputs compared."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qkit import reference
from qkit.engines.abilities import want_honored
from qkit.engines.protocol import Modules
from qkit.qtensor import DType
from qkit.reference.ranges import static_scales
from qkit.rules import Recipe, Rule
from qkit.testing.hard_tensors import random

Outcome = Literal["native", "decoded", "missing"]

INPUTS, OUTPUTS, ROWS = 512, 256, 48  #: sizes of the probed layer, and the rows of its input

#: How far outputs may be apart, relative to abs(x) @ abs(w) (numerics.md, R13), and to themselves: each is rounded once.
TOLERANCE = {"float32": (1e-6, 0.0), "bfloat16": (5e-4, 2**-7), "float16": (5e-4, 2**-10)}


@dataclass(frozen=True, slots=True)
class Probe:
    """One rule of a recipe on one engine.

    Attributes:
        recipe, backend, device, dtype, kind: the subject of the probe; `device` is empty where the engine chose it.
        outcome: `native`, if the converted layer runs on the engine's own quantized tensor or layer; `decoded`, if each call
            decodes its weight; `missing`, if it does not run.
        detail: the name of that tensor or layer, the reason for decoding, or the error.
        codes: how many codes and scales of the converted layer differ from the reference, out of `compared`.
        difference: largest difference of the prepared layer's outputs from the converted one's, relative to abs(x) @ abs(w).
        within: whether all outputs are as near as numerics.md demands (R13).
    """

    recipe: str
    backend: str
    device: str
    dtype: DType
    kind: str
    outcome: Outcome = "missing"
    detail: str = ""
    codes: int = 0
    compared: int = 0
    difference: float = 0.0
    within: bool = False

    @property
    def exact(self) -> bool:
        """Whether the layer ran, with the reference's codes, and the prepared and the converted layer agree."""
        return self.outcome != "missing" and not self.codes and self.within


def probe(engine: Modules, recipe: Recipe, *, dtype: DType, device: str = "") -> Iterator[Probe]:
    """Every rule of `recipe` with a weight, on `engine`; `device` is the name of the device in the results."""
    single = [rule for rule in recipe.rules if rule.kind != "experts"]  # an engine makes no block of experts by itself
    for rule in dict.fromkeys(replace(rule, match=("*",)) for rule in single if rule.weight):
        tried = Probe(recipe.name, engine.name, device, dtype, rule.kind)
        try:
            yield _probe(engine, rule, tried)
        except Exception as error:  # an engine may fail in any way: the table shows it, and goes on
            yield replace(tried, detail=f"{type(error).__name__}: {error}".splitlines()[0])


def worst(probes: Iterable[Probe]) -> Outcome:
    """The worst outcome among the rules of one recipe."""
    outcomes = {probe.outcome for probe in probes}
    return next(outcome for outcome in ("missing", "decoded", "native") if outcome in outcomes)


def _probe(engine: Modules, rule: Rule, tried: Probe) -> Probe:
    assert rule.weight is not None
    w = random((OUTPUTS, INPUTS), 11, tried.dtype)
    x: NDArray[Any] = random((ROWS, INPUTS), 12, tried.dtype)
    if rule.kind == "embedding":
        x = np.arange(OUTPUTS, dtype=np.int32)
    want_honored(engine, [rule], "prepare")
    prepared = engine.prepare_layer(engine.make_layer(rule.kind, w), rule)
    if rule.range != "dynamic":
        engine.clear_ranges(prepared)
        engine.switch_mode(prepared, "calibrating")
        engine.run_layer(prepared, x)
        engine.switch_mode(prepared, "on")
    before = engine.run_layer(prepared, x)
    ranges = {name.removesuffix("_range"): engine.to_numpy(a) for name, a in engine.tensors(prepared).items()}
    static = static_scales(rule, ranges, path=tried.recipe)
    packed = engine.pack(prepared, engine.quantize(engine.weight(prepared), rule.weight), rule, static=static)
    (layer,) = engine.layers(packed)
    wanted = reference.quantize(w, rule.weight)
    made = engine.unpack(packed).map(engine.to_numpy).parts()
    values = reference.dequantize(wanted).astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(values).T if rule.kind == "linear" else np.abs(values)
    after = engine.run_layer(packed, x).astype(np.float64)
    apart = np.abs(before.astype(np.float64) - after)
    relative, rounding = TOLERANCE[tried.dtype]
    return replace(
        tried,
        outcome="native" if layer.native else "decoded",
        detail=layer.execution,
        codes=sum(int(np.count_nonzero(made[name] != part)) for name, part in wanted.parts().items()),
        compared=sum(part.size for part in wanted.parts().values()),
        difference=float((apart / np.maximum(scale, np.finfo(np.float32).tiny)).max()),
        within=bool(np.isfinite(after).all() and (apart <= relative * scale + rounding * np.abs(after)).all()),
    )
