"""coverage: for every layer of a model its grid and how it runs, or the reason why the recipe left it alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qkit.engines.layer import Layer
from qkit.engines.protocol import Arrays, Modules
from qkit.grid import Grid
from qkit.pipeline import NOTE, surgeon


def bits_per_weight(layer: Layer, grid: Grid) -> float:
    """Stored bits per element of the weights of `layer` on `grid`; each expert has scales of its own."""
    matrices = [(1, layer.shape)] if layer.kind != "experts" else [(n, one) for n, *one in layer.projections.values()]
    bits = sum(count * prod(shape) * grid.bits_per_weight(tuple(shape)) for count, shape in matrices)
    return bits / prod(layer.shape)


@dataclass(frozen=True, slots=True)
class Covered:
    """One row of `coverage`.

    Attributes:
        path, kind, shape: as in `qkit.engines.layer.Layer`.
        weight, activation, output: the grids as text, with the range if it is static; empty where there is none.
        state: `prepared`; `native: ` and the kernel; `decoded first: ` and the reason; or `left alone: ` and the reason.
        bits: stored bits per weight.
        tied: path of the layer before it that has the same weight and stores it.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight: str
    activation: str
    output: str
    state: str
    bits: float
    tied: str = ""


@dataclass(frozen=True, slots=True)
class Coverage:
    """One row for every layer of a model. Prints as a table."""

    rows: tuple[Covered, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all rows; a tied weight counts once."""
        rows = [row for row in self.rows if not row.tied]
        weights = sum(prod(row.shape) for row in rows)
        return sum(row.bits * prod(row.shape) for row in rows) / weights if weights else 0.0

    def __str__(self) -> str:
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                _grids(row),
                row.state + (f", tied to {row.tied}" * bool(row.tied)),
            )
            for row in self.rows
        ]
        widths = [max((len(row[i]) for row in cells), default=0) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in cells
        ]
        return "\n".join([*lines, f"{self.bits_per_weight:.2f} bits per weight"])


def coverage(model: Any, *, backend: str | Arrays | None = None) -> Coverage:
    """For every layer of `model` its grid and how it runs, or the reason why the recipe left it alone."""
    engine = surgeon(model, backend)
    tensors = engine.tensors(model)
    return Coverage(tuple(_cover(layer, engine, tensors) for layer in engine.layers(model)))


def _cover(layer: Layer, engine: Modules, tensors: Mapping[str, Any]) -> Covered:
    rule = layer.rule
    if rule is None or rule.weight is None:
        reason = layer.obstacle if layer.kind == "other" else getattr(layer.module, NOTE, "") or layer.obstacle
        bits = 8 * sum(weight.nbytes for weight in _weights(layer, engine, tensors)) / prod(layer.shape)
        state = f"left alone: {reason}" if reason else "float"
        return Covered(layer.path, layer.kind, layer.shape, "", "", "", state, bits, layer.tied)
    state = f"{'native' if layer.native else 'decoded first'}: {layer.execution}"
    if layer.stage == "prepared":
        state = {"on": "prepared", "off": "prepared, switched off", "calibrating": "calibrating"}[layer.mode]
    static = "" if rule.range == "dynamic" else f" {rule.range}"
    activation, output = (f"{grid}{static}" if grid else "" for grid in (rule.activation, rule.output))
    weight = f"{rule.weight} learned" if rule.scales == "learned" else str(rule.weight)
    bits, state = bits_per_weight(layer, rule.weight), ", ".join(filter(None, (state, layer.adapter)))
    return Covered(layer.path, layer.kind, layer.shape, weight, activation, output, state, bits, layer.tied)


def _weights(layer: Layer, engine: Modules, tensors: Mapping[str, Any]) -> list[Any]:
    """The float weights of a layer; none for those that are stored elsewhere, since they are tied."""
    if layer.kind == "linear" or layer.kind == "embedding":
        return [engine.weight(layer.module)]
    return [tensors[name] for name in (layer.stored or (layer.path,)) if name in tensors]


def _grids(row: Covered) -> str:
    text = " @ ".join(filter(None, (row.weight, row.activation)))
    return f"{text} -> {row.output}" if row.output else text
