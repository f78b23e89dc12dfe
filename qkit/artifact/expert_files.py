"""Float experts of a block as the files of its type of model have them: one by one, or stacked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.experts import DOWN, GATE_UP, INTERLEAVED, PROJECTIONS, STACK_NAMES, TRANSPOSED, paths_of, types_of


def file_stack(block: str, weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors with `weights` [experts, outputs, inputs] of the block, by name, as files of such a model have them."""
    kinds = types_of(config)
    own = next((STACK_NAMES[kind] for kind in kinds if kind in STACK_NAMES), {})
    if not own and not kinds & set(TRANSPOSED):
        shapes = {name: array.shape for name, array in weights.items()}
        paths = paths_of(block, shapes, config)
        return {f"{path}.weight": weights[projection][number] for (number, projection), path in paths.items()}
    gate, up, down = (weights[name] for name in PROJECTIONS)
    interleaved = bool(kinds & set(INTERLEAVED))
    both = (
        np.stack([gate, up], axis=2).reshape(len(up), -1, up.shape[2]) if interleaved else np.concatenate([gate, up], 1)
    )
    names = {ours: theirs for theirs, ours in own.items()}
    place = block.removesuffix("experts")
    return {
        place + names.get(name, name): np.ascontiguousarray(array.swapaxes(1, 2)) if kinds & set(TRANSPOSED) else array
        for name, array in ((GATE_UP, both), (DOWN, down))
    }
