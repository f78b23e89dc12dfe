"""coverage: for every layer of a model its grid and how it runs, or the reason why the recipe left it alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

from qkit.engines.layer import Layer
from qkit.engines.protocol import Arrays, Modules
from qkit.errors import ArtifactError
from qkit.pipeline import NOTE, surgeon
from qkit.qtensor import DType
from qkit.rules import Rule


def bits_per_weight(layer: Layer, rule: Rule) -> float:
    """Stored bits per element of the weights of `layer` under `rule`, as files have them; each expert has tensors of its own.

    Those of the grid, where files have no layout for it or the engine does not say the type of the values.
    """
    matrices = [(1, layer.shape)] if layer.kind != "experts" else [(n, one) for n, *one in layer.projections.values()]
    bits = sum(count * _stored_bits(tuple(shape), rule, layer.dtype) for count, shape in matrices)
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
    """One row for every layer of a model. Prints as a table.

    Attributes:
        rows: one for every layer.
        rest, rest_bits: how many numbers all other tensors have, such as norms and biases, and their bits.
    """

    rows: tuple[Covered, ...]
    rest: int = 0
    rest_bits: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers the model has; a tied weight counts once."""
        return self.rest + sum(prod(row.shape) for row in self.rows if not row.tied)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors, as `qkit plan` and `qkit inspect` count."""
        return round((self.rest_bits + sum(row.bits * prod(row.shape) for row in self.rows if not row.tied)) / 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per number of the model."""
        return 8 * self.nbytes / self.numbers if self.numbers else 0.0

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

    def _repr_html_(self) -> str:
        from qkit.notebook import table  # here, so that `import qkit` stays cheap

        rows = (
            (
                row.path,
                "x".join(map(str, row.shape)),
                row.weight,
                row.activation,
                row.output,
                f"{row.bits:.2f}",
                row.state + (f", tied to {row.tied}" if row.tied else ""),
            )
            for row in self.rows
        )
        caption = f"{self.bits_per_weight:.2f} bits per weight, {self.nbytes:,} bytes"
        return table(caption, ("layer", "shape", "weight", "activation", "output", "bits", "state"), rows)


def coverage(model: Any, *, backend: str | Arrays | None = None) -> Coverage:
    """For every layer of `model` its grid and how it runs, or the reason why the recipe left it alone."""
    engine = surgeon(model, backend)
    tensors = engine.tensors(model)
    layers = list(engine.layers(model))
    rest = _rest(layers, tensors)
    rows = tuple(_cover(layer, engine, tensors) for layer in layers)
    return Coverage(rows, sum(prod(one.shape) for one in rest), 8 * sum(_nbytes(one, engine) for one in rest))


def _nbytes(array: Any, engine: Modules) -> int:
    """The bytes of an engine's array. Most arrays say so themselves, which saves a copy to NumPy."""
    return int(array.nbytes if hasattr(array, "nbytes") else engine.to_numpy(array).nbytes)


def _cover(layer: Layer, engine: Modules, tensors: Mapping[str, Any]) -> Covered:
    rule = layer.rule
    if rule is None or rule.weight is None:
        reason = layer.obstacle if layer.kind == "other" else getattr(layer.module, NOTE, "") or layer.obstacle
        bits = 8 * sum(_nbytes(one, engine) for one in _weights(layer, engine, tensors)) / prod(layer.shape)
        state = f"left alone: {reason}" if reason else "float"
        return Covered(layer.path, layer.kind, layer.shape, "", "", "", state, bits, layer.tied)
    state = f"{'native' if layer.native else 'decoded first'}: {layer.execution}"
    if layer.stage == "prepared":
        state = {"on": "prepared", "off": "prepared, switched off", "calibrating": "calibrating"}[layer.mode]
    static = "" if rule.range == "dynamic" else f" {rule.range}"
    activation, output = (f"{grid}{static}" if grid else "" for grid in (rule.activation, rule.output))
    weight = f"{rule.weight} {rule.scales}" if rule.scales != "rule" else str(rule.weight)
    bits, state = bits_per_weight(layer, rule), ", ".join(filter(None, (state, layer.adapter)))
    return Covered(layer.path, layer.kind, layer.shape, weight, activation, output, state, bits, layer.tied)


def _stored_bits(shape: tuple[int, ...], rule: Rule, dtype: str) -> float:
    from qkit.formats import compressed_tensors  # here, so that `import qkit` stays cheap
    from qkit.storage.layout import TYPE_NAMES, Slot

    assert rule.weight is not None
    try:
        form = compressed_tensors.form_of(rule)
    except ArtifactError:
        form = ""
    if not (form and dtype):
        return prod(shape) * rule.weight.bits_per_weight(shape)
    parts = compressed_tensors.contents(rule.weight, dtype=cast(DType, dtype), shape=shape, form=form)
    return 8 * sum(Slot(name, TYPE_NAMES[kind], size).nbytes for name, (kind, size) in parts.items())


def _rest(layers: Sequence[Layer], tensors: Mapping[str, Any]) -> list[Any]:
    """The tensors that are no weight of a layer and no part of a grid: norms, biases and the like."""
    own, parts = set(), set()
    for layer in layers:
        prefix = f"{layer.path}." if layer.path else ""
        own |= {layer.path, f"{prefix}weight", *layer.stored}
        if layer.rule:
            parts.add(layer.path)
    return [
        tensor
        for name, tensor in tensors.items()
        if name not in own and (name.endswith("bias") or name.rpartition(".")[0] not in parts)
    ]


def _weights(layer: Layer, engine: Modules, tensors: Mapping[str, Any]) -> list[Any]:
    """The float weights of a layer; none for those that are stored elsewhere, since they are tied."""
    if layer.kind == "linear" or layer.kind == "embedding":
        return [engine.weight(layer.module)]
    return [tensors[name] for name in (layer.stored or (layer.path,)) if name in tensors]


def _grids(row: Covered) -> str:
    text = " @ ".join(filter(None, (row.weight, row.activation)))
    return f"{text} -> {row.output}" if row.output else text
