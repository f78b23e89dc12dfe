"""The changes of codes and values between two quantized models, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import reference
from qkit.engines.abilities import require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Modules
from qkit.formats.packed import pack, unpack
from qkit.qtensor import QTensor
from qkit.reference.packing import Packed

BLOCK = 1 << 22  #: numbers in one block of the comparison


@dataclass(frozen=True, slots=True)
class CodeChange:
    """The difference of one layer's weight between two models.

    Attributes:
        path: of the layer.
        numbers: how many weights it has.
        flipped: how many codes differ, as whole multiples of a positive step. None: the two models have different elements.
        steps: mean distance of the values, in steps (scales) of the first model.
        error: RMS of the distance of the values, over the RMS of the first model's values.
    """

    path: str
    numbers: int
    flipped: int | None
    steps: float
    error: float


def packed_weights(engine: Modules, model: Any) -> dict[str, Packed]:
    """The quantized weights of a converted `model` by the path of their layer, each once, packed as in files."""
    return {
        path: pack(q.map(engine.to_numpy))
        for layer in engine.layers(model)
        if layer.rule and not layer.tied
        for path, q in _codes(engine, layer)
    }


def _codes(engine: Modules, layer: Layer) -> Iterator[tuple[str, QTensor[Any]]]:
    """The quantized weights of a converted layer with their paths; those of experts one by one."""
    if layer.kind != "experts":
        yield layer.path, engine.unpack(layer.module)
        return
    for name, experts in require(engine, Mixes).unpack_experts(layer.module).items():
        for number, q in enumerate(experts):
            yield f"{layer.path}.{number}.{name}", q


def compare_codes(first: Mapping[str, Packed], second: Mapping[str, Packed]) -> list[CodeChange]:
    """The changes of every layer that is quantized in both models, in the order of the first."""
    return [_code_change(path, packed, second[path]) for path, packed in first.items() if path in second]


def _code_change(path: str, first: Packed, second: Packed) -> CodeChange:
    biased = first.grid.has_biases or second.grid.has_biases  # whose codes count from another number in each group
    alike = first.grid.element == second.grid.element and (not biased or first.grid == second.grid)
    flipped, steps, error, size = 0, 0.0, 0.0, 0.0
    for a, b in zip(map(unpack, first.blocks(BLOCK)), map(unpack, second.blocks(BLOCK)), strict=True):
        if alike:
            flipped += int(np.count_nonzero(_multiples(a) != _multiples(b)))
        one, other = (reference.dequantize(q).astype(np.float64) for q in (a, b))
        step = np.abs(reference.scale_values(a)).astype(np.float64)
        apart = np.abs(one - other)
        steps += float((apart.reshape(a.grid.group_shape(a.shape)) / step[..., None]).sum())
        error, size = error + float((apart**2).sum()), size + float((one**2).sum())
    numbers = first.shape[0] * first.shape[1]
    relative = (error / size) ** 0.5 if size else float(error > 0)
    return CodeChange(path, numbers, flipped if alike else None, steps / numbers, relative)


def _multiples(q: QTensor[NDArray[Any]]) -> NDArray[Any]:
    """Codes of integers, less their zero point and times the sign of their scale; codes of floats unchanged."""
    if q.grid.element.kind == "float":
        return q.codes
    grouped = q.codes.reshape(q.grid.group_shape(q.shape)).astype(np.int16)
    if q.zeros is not None:
        grouped -= q.zeros[..., None]
    grouped *= np.sign(q.scales)[..., None].astype(np.int16)
    return grouped.reshape(q.shape)
