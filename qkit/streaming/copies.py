"""Weights that a checkpoint holds twice: an output head, or an embedding of the decoder, that is tied to the embedding."""

from collections.abc import Collection, Mapping
from typing import Any

from qkit.artifact.families import HEADS, says_tied, token_embedding
from qkit.engines.layer import Layer
from qkit.errors import PlanError
from qkit.storage.read import Stored

BLOCK = 1 << 20  #: bytes compared together


def tied_copies(tensors: Mapping[str, Stored], layers: Collection[Layer], config: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that are the token embedding again, by name, each with the embedding's name.

    Reads the tensors that have the embedding's shape, up to the first byte that differs.

    Raises:
        PlanError: the configuration says that the head is tied to the embedding, and the files have another head.
    """
    owner = token_embedding(layers)
    if owner is None or not says_tied(config) or f"{owner.path}.weight" not in tensors:
        return {}
    name = f"{owner.path}.weight"
    embedding = tensors[name]
    copies = {}
    for layer in layers:
        other = f"{layer.path}.weight"
        if layer.path == owner.path or other not in tensors:
            continue
        if _same(embedding, tensors[other]):
            copies[other] = name
        elif layer.path.rpartition(".")[2] in HEADS:
            raise PlanError(
                f"{other} is stored, it is not {name}, and config.json says that it is tied to it (tie_word_embeddings): make "
                "one of them true"
            )
    return copies


def _same(one: Stored, other: Stored) -> bool:
    if (one.slot.dtype, one.slot.shape) != (other.slot.dtype, other.slot.shape):
        return False
    a, b = (stored.mapped().reshape(-1).view("uint8") for stored in (one, other))
    return all(bool((a[i : i + BLOCK] == b[i : i + BLOCK]).all()) for i in range(0, len(a), BLOCK))
