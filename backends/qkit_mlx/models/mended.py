"""Parts of mlx-lm's models that qkit's engine computes as transformers does: windows, activations, ropes, choices of experts."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import ernie4_5_moe, gemma, glm, gpt_bigcode, gpt_neox, granitemoehybrid, jamba, mamba2, starcoder2
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.deepseek_v2 import DeepseekV2YarnRotaryEmbedding
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

from qkit.errors import BackendError
from qkit.formats.mlx_activations import asked, is_near
from qkit.formats.mlx_limits import groups_of, language, sliding_layers
from qkit.formats.rope import partial_factor, rope_type, ropes_of
from qkit.formats.rope_frequencies import long_factor, original_length, plain_waves, yarn_factor, yarn_waves

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
#: mlx-lm's modules by the type of rope that they compute.
SCALED: Final[Mapping[type[nn.Module], str]] = {
    YarnRoPE: "yarn",
    DeepseekV2YarnRotaryEmbedding: "yarn",
    SuScaledRoPE: "longrope",
}

#: mlx-lm's norms of gated states, which normalize all of them together.
GATED: Final = (mamba2.MambaRMSNormGated, granitemoehybrid.GraniteMoeHybridRMSNormGated)


def mend(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Gives parts of `model` the window, the activation, the scaled rope and the choice of experts that `config` asks for.

    Raises:
        BackendError: the configuration has several scaled ropes, and mlx-lm does not say which of them a layer has.
    """
    window, slides = sliding_layers(config)
    for layer, slide in zip(model.layers if slides else (), slides, strict=False):
        if slide:
            block: Any = type(layer)
            layer.__class__ = _sliding(block, window)
    kind, inner = language(config)
    for module in model.modules() if kind in BLOCKS and is_near(inner, kind) else ():
        if type(module) is BLOCKS[kind][0]:
            module.__class__ = _activated(kind, asked(inner, kind))
    for module in model.modules():
        if type(module) in SCALED:
            _scale(module, SCALED[type(module)], inner)
        elif type(module) is ernie4_5_moe.Ernie4_5_MoeMLP:
            module.__class__ = BiasedChoice
            module["moe_statics"] = Statistics(module.args.moe_num_experts)
        elif type(module) in GATED and (groups := groups_of(inner)) > 1:
            module.__class__, module.groups = GroupedNorm, groups
        elif type(module) is jamba.JambaSparseMoeBlock:
            module.__class__ = PlainScores
        elif type(module) is glm.GLMAttention:
            module.rope.dims = int(module.head_dim * partial_factor(inner))


def _scale(module: Any, kind: str, config: Mapping[str, Any]) -> None:
    """Gives a rope of mlx-lm's the waves and factors of transformers."""
    found: list[dict[str, Any]] = []
    for rope in ropes_of(config).values():
        if rope_type(rope) == kind and rope not in found:
            found.append(rope)
    if len(found) > 1:
        raise BackendError(f"mlx-lm has {len(found)} ropes of type {kind!r}, and does not say which layer has which")
    for rope in found:
        if kind == "yarn":
            module._freqs = mx.array(yarn_waves(rope, config, width=2 * module._freqs.size))  # noqa: SLF001  its only name
            module.mscale = yarn_factor(rope)
        else:
            module.__class__ = LongRope
            module.set_factors(rope, config)


class Statistics(nn.Module):
    """The biases of the choice of experts, which mlx-lm's Ernie 4.5 leaves out. They do not train, as in transformers."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e_score_correction_bias = mx.zeros((1, count))
        self.freeze()


class BiasedChoice(ernie4_5_moe.Ernie4_5_MoeMLP):
    """Experts of Ernie 4.5, chosen by their probabilities and biases, and weighed by their probabilities."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> the same shape."""
        gates = self.gate_act(self.gate(x).astype(mx.float32))
        by = gates + self.moe_statics.e_score_correction_bias[0].astype(mx.float32)
        chosen = mx.stop_gradient(mx.argpartition(-by, kth=self.k - 1, axis=-1)[..., : self.k])
        scores = mx.take_along_axis(gates, chosen, axis=-1)
        scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
        y = self.switch_mlp(x, chosen)
        out: mx.array = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class GroupedNorm(mamba2.MambaRMSNormGated):
    """A norm of gated states, of each group by itself, in float32."""

    def __call__(self, hidden_states: mx.array, gate: mx.array | None = None) -> mx.array:
        """x [..., width] -> the same shape."""
        x = hidden_states.astype(mx.float32)
        x = x if gate is None else x * nn.silu(gate.astype(mx.float32))
        each = x.reshape(*x.shape[:-1], self.groups, -1)
        normed = mx.fast.rms_norm(each, None, self.eps).reshape(x.shape)
        out: mx.array = self.weight * normed.astype(hidden_states.dtype)
        return out


class PlainScores(jamba.JambaSparseMoeBlock):
    """Experts of Jamba, weighed by their probabilities among all experts, which mlx-lm scales to a sum of one."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> the same shape."""
        gates = mx.softmax(self.router(x), axis=-1, precise=True)
        k = self.num_experts_per_tok
        chosen = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
        scores = mx.take_along_axis(gates, chosen, axis=-1)
        out: mx.array = (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)
        return out


class LongRope(SuScaledRoPE):
    """A longrope whose factors depend on the length of the text, as in transformers."""

    def set_factors(self, rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Takes the factors of `rope`. transformers gives phimoe the short waves at any length, and two factors of its own."""
        waves = mx.array(plain_waves(rope, config, width=self.dim))
        short, long = (mx.array(rope[f"{name}_factor"], mx.float32) * waves for name in ("short", "long"))
        self.original_max_position_embeddings = original_length(rope, config)
        if config.get("model_type") == "phimoe":
            self._short, self._long = (float(rope["short_mscale"]), short), (float(rope["long_mscale"]), short)
        else:
            factor = long_factor(rope, config)
            self._short, self._long = (factor, short), (factor, long)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x [..., tokens, width] -> the same shape; `offset` is the number of tokens before them."""
        end: Any = offset + x.shape[-2]
        scale: Any
        if isinstance(end, mx.array):  # of several texts, the longest
            longer = mx.max(end) > self.original_max_position_embeddings
            both: Any = zip(self._long, self._short, strict=True)
            scale, waves = (mx.where(longer, long, short) for long, short in both)
            scale = scale.astype(x.dtype)
        else:
            scale, waves = self._long if end > self.original_max_position_embeddings else self._short
        part = mx.concatenate([x[..., : self.dim] * scale, x[..., self.dim :]], axis=-1)
        return mx.fast.rope(part, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=waves)


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
