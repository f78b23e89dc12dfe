"""Experts in a directory for mlx-lm, where stacks hold those of a block, taken apart into experts as other files have them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qkit.artifact.expert_files import file_stack
from qkit.experts import PROJECTIONS
from qkit.formats import mlx_lm
from qkit.formats.mlx_config import place_of, stack_path
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.packed import Tensors, join


def expert_parts(tensors: Tensors, path: str, config: Mapping[str, Any]) -> Tensors:
    """The stored tensors of the weight of one expert, at `path` in other files: views of those of its stack."""
    place, number = place_of(path, config)
    return {name: tensors[join(place, name)][number] for name in mlx_lm.NAMES if join(place, name) in tensors}


def without_stacks(tensors: Tensors, paths: Iterable[str], config: Mapping[str, Any]) -> Tensors:
    """`tensors` without those of the stacks whose experts are at `paths`; those of float experts as other files have them."""
    places = {place_of(path, config)[0] for path in paths}
    rest = {name: array for name, array in tensors.items() if name.rpartition(".")[0] not in places or _is_bias(name)}
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return rest
    end = f".{family.stack}"
    for block in {f"{name.rpartition(end)[0]}.experts" for name in rest if f"{end}." in name}:
        named = {projection: stack_path(block, projection, config) for projection in PROJECTIONS}
        weights = {
            projection: rest.pop(f"{place}.weight")
            for projection, place in named.items()
            if getattr(rest.get(f"{place}.weight"), "ndim", 0) == 3
        }
        rest.update(file_stack(block, weights, config) if weights else {})
        if family.biases and f"{named['down_proj']}.bias" in rest:
            gate, up = (rest.pop(f"{named[name]}.bias") for name in ("gate_proj", "up_proj"))
            rest[f"{block}.gate_up_proj_bias"] = np.stack([gate, up], axis=-1).reshape(len(gate), -1)
            rest[f"{block}.down_proj_bias"] = rest.pop(f"{named['down_proj']}.bias")
    return rest


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")
