"""Blocks of mlx-lm that qkit's engine computes as transformers does: sliding windows, and activations, that mlx-lm ignores."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma, gpt_bigcode, gpt_neox, starcoder2
from mlx_lm.models.base import create_attention_mask

from qkit.formats.mlx_activations import asked, is_near
from qkit.formats.mlx_limits import language, sliding_layers

Module = type[nn.Module]
#: Functions by qkit's names of activations.
GELUS: Final[Mapping[str, Callable[[mx.array], mx.array]]] = {"gelu": nn.gelu, "gelu by tanh": nn.gelu_approx}
#: By model type: mlx-lm's block, and its layers before and after the activation.
BLOCKS: Final[Mapping[str, tuple[Module, str, str]]] = {
    "gpt_neox": (gpt_neox.MLP, "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_bigcode": (gpt_bigcode.MLP, "c_fc", "c_proj"),
    "starcoder2": (starcoder2.MLP, "c_fc", "c_proj"),
    "gemma": (gemma.MLP, "gate_proj", "down_proj"),
}


def mend(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Gives blocks of `model` the sliding window and the activation of `config`, where mlx-lm has others."""
    window, slides = sliding_layers(config)
    for layer, slide in zip(model.layers if slides else (), slides, strict=False):
        if slide:
            block: Any = type(layer)
            layer.__class__ = _sliding(block, window)
    kind, inner = language(config)
    for module in model.modules() if kind in BLOCKS and is_near(inner, kind) else ():
        if type(module) is BLOCKS[kind][0]:
            module.__class__ = _activated(kind, asked(inner, kind))


@cache
def _sliding(block: Module, window: int) -> Module:
    """The class `block` with a window: a token sees `window` tokens, itself among them."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        return block.__call__(self, x, _within(window, x, mask, cache), cache)

    return type(block.__name__, (block,), {"__call__": __call__, "__module__": block.__module__})


def _within(window: int, x: mx.array, mask: Any, cache: Any) -> Any:
    """The mask of `x` with the window; `mask`, mlx-lm's own, where no token has more before it than the window holds."""
    before = 0 if cache is None else cache.offset
    if isinstance(before, int) and before + x.shape[1] <= window:
        return mask
    return create_attention_mask(x, cache, window_size=window)


@cache
def _activated(kind: str, activation: str) -> Module:
    """The class of the blocks of a `kind` with `activation`."""
    block, first, last = BLOCKS[kind]
    function = GELUS[activation]

    def __call__(self: Any, x: mx.array) -> mx.array:
        y = function(self[first](x))
        out: mx.array = self[last](y * self.up_proj(x) if kind == "gemma" else y)
        return out

    return type(block.__name__, (block,), {"__call__": __call__, "__module__": block.__module__})
