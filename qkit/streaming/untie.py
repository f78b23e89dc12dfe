"""A tied output head as a weight of its own: a second tensor with the bytes of the embedding. Reads no tensor."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.artifact.families import HEAD, layer_of, tied_head
from qkit.engines.layer import Layer
from qkit.errors import PlanError
from qkit.storage.read import Stored


def untied(
    tensors: Mapping[str, Stored], config: Mapping[str, Any] | None, folder: Path
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors and the configuration of a model whose output head has its own weight, equal to its embedding.

    Raises:
        PlanError: the model has no tied head, or no configuration to say so.
    """
    known = dict(config or {})
    found = [layer_of(stored.slot, known) for stored in tensors.values()]
    owner = tied_head([layer for layer in found if isinstance(layer, Layer)], known)
    if config is None or owner is None:
        raise PlanError(f"{folder} has no tied output head: leave --untie out")
    embedding = tensors[f"{owner.path}.weight"]
    head = replace(embedding, slot=replace(embedding.slot, name=f"{HEAD}.weight"))
    known["tie_word_embeddings"] = False
    if "tie_word_embeddings" in (known.get("text_config") or {}):
        known["text_config"] = {**known["text_config"], "tie_word_embeddings": False}
    return {**tensors, head.slot.name: head}, known
