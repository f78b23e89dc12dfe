"""Stacks of experts in mlx-lm's files as the tensors of single experts: parts of the same bytes. Reads headers alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qkit.errors import ArtifactError
from qkit.experts import paths_of
from qkit.formats import mlx_config
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.mlx_lm import Container
from qkit.formats.packed import join
from qkit.sources.mlx_form import PARTS
from qkit.sources.parts import Tensors, take
from qkit.storage.read import Stored

Held = dict[str, tuple[Container, tuple[int, ...]]]


def unstack(tensors: Tensors, held: Held, config: Mapping[str, Any]) -> None:
    """Puts the tensors of each expert, under its name in other files, in the place of those of its stack, in both arguments.

    Args:
        held: container and shape of each quantized weight, by path.

    Raises:
        ArtifactError: the parts of a stack have several numbers of experts.
    """
    family = FAMILIES[str(config["model_type"])]
    if family.biases:  # whose experts other files have in one tensor
        return
    for path in sorted({name.rpartition(".")[0] for name in tensors if f".{family.stack}." in name}):
        if f"{path}.weight" not in tensors or len(tensors[f"{path}.weight"].slot.shape) != 3:
            continue
        block, projection = mlx_config.block_of(path, config)
        parts = take(tensors, path, PARTS)
        counts = {name: one.slot.shape[0] for name, one in parts.items()}
        if len(set(counts.values())) > 1:
            raise ArtifactError(f"{path}: its parts have {counts} experts: fetch the directory again")
        mine = held.pop(path, None)
        for (number, _), place in paths_of(block, {projection: (counts["weight"],)}, config).items():
            for name, one in parts.items():
                tensors[join(place, name)] = _one(one, number, join(place, name))
            if mine:
                held[place] = mine[0], mine[1][1:]


def _one(stack: Stored, number: int, name: str) -> Stored:
    """The matrix of one expert of a stack."""
    count, *shape = stack.slot.shape
    slot = replace(stack.slot, name=name, shape=tuple(shape))
    return Stored(slot, stack.file, stack.begin + number * (stack.slot.nbytes // count))
