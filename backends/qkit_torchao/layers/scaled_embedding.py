"""Embeddings that multiply the rows that they look up by a constant, as those of Gemma and BART in transformers."""

from typing import Any

from torch import Tensor, nn

NAME = "ScaledWordEmbedding"  #: how the names of all such classes in transformers end


def is_scaled(module: nn.Module) -> bool:
    """Whether `module` is such an embedding; its weight is that of a plain one."""
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith(NAME) and hasattr(module, "embed_scale")


def scaled(module: Any, rows: Tensor) -> Tensor:
    """`rows` of the embedding `module`, times its constant where it has one."""
    scale: Tensor | float | None = getattr(module, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
