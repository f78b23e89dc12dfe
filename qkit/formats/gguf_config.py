"""A model's configuration for GGUF: the architecture and its numbers, or the reason for a refusal. Plain values only.

Read off llama.cpp 0.5 (`src/models/*.cpp`, `conversion/*.py`) and transformers 5.23.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.gguf_rope import rope_numbers
from qkit.formats.rope import ropes

LOCAL_THETA: Final = 10000.0  #: theta of the rope of sliding attention, where GGUF has no key for it
BIASES: Final = re.compile(
    r"(.+\.experts)\.(gate_up_proj|down_proj)_bias"
)  #: names of stacked biases, which GGUF splits
MOST: Final = 1 << 32  #: GGUF's counts are smaller than this


@dataclass(frozen=True, slots=True)
class Architecture:
    """GGUF's architecture for a type of model.

    Attributes:
        name: GGUF's name.
        activation: the one activation function that it computes.
        interleaved: whether the rows of queries and keys are in the order of complex pairs.
        norms_plus_one: whether norms store 1 + w.
        tied: whether the output head is always the embedding.
        period: sliding attention in all layers but each of this number; 0 where there is none.
        scale_layers: the number of layers with which attention is scaled by the width of the model over its heads, and not by
            the width of a head; 0 where there is none.
        scaled: whether llama.cpp multiplies the products of all linear layers by the scale of a tensor, which NVFP4 needs.
        normalized: whether the weights of a token's experts sum to one; None where no configuration says.
        latent: whether attention is that of DeepSeek, whose heads turn a part of their numbers.
        keys: further numbers: GGUF's name without the architecture's, and the configuration's key.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norms_plus_one: bool = False
    tied: bool = False
    period: int = 0
    scale_layers: int = 0
    scaled: bool = False
    normalized: bool | None = None
    latent: bool = False
    keys: tuple[tuple[str, str], ...] = ()

    def why_no_scale(self, kind: str) -> str:
        """Why llama.cpp does not multiply by the scale of a tensor under a rule of this kind; empty where it does."""
        if kind == "experts":
            return "GGUF's NVFP4 of experts has no place for the scale of each"
        if kind != "embedding" and self.scaled:
            return ""
        where = "an embedding" if kind == "embedding" else f"the layers of a {self.name!r}"
        return f"llama.cpp ignores the scale of an NVFP4 tensor in {where}"


_GELU: Final = "gelu_pytorch_tanh"
_CAPS: Final = tuple((name, name) for name in ("attn_logit_softcapping", "final_logit_softcapping"))
_MULTIPLIERS: Final = (
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
)
#: A file has one of the two counts of experts: transformers has saved either.
_EXPERTS: Final = (
    ("expert_count", "num_experts"),
    ("expert_count", "num_local_experts"),
    ("expert_used_count", "num_experts_per_tok"),
)
_WIDTH: Final = (("expert_feed_forward_length", "moe_intermediate_size"),)
_SHARED: Final = (("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),)
_LATENT: Final = (
    ("expert_count", "n_routed_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
)
FLOATS: Final = {name for name, _ in (*_CAPS, *_MULTIPLIERS)} | {
    "attention.layer_norm_rms_epsilon",
    "expert_weights_scale",
}
ARCHITECTURES: Final = {
    "llama": Architecture("llama", interleaved=True, scaled=True),
    "mistral": Architecture("llama", interleaved=True, scaled=True),
    "mixtral": Architecture("llama", interleaved=True, scaled=True, keys=_EXPERTS),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", keys=(*_EXPERTS, *_WIDTH, *_SHARED), normalized=False),
    "qwen3_moe": Architecture("qwen3moe", keys=(*_EXPERTS, *_WIDTH), normalized=True),
    "gpt_oss": Architecture("gpt-oss", period=2, keys=(*_EXPERTS, ("expert_feed_forward_length", "intermediate_size"))),
    "deepseek_v2": Architecture("deepseek2", latent=True, keys=(*_LATENT, *_WIDTH)),
    "qwen3": Architecture("qwen3", scaled=True),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "granite": Architecture("granite", interleaved=True, keys=_MULTIPLIERS),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "gemma": Architecture("gemma", activation=_GELU, norms_plus_one=True, tied=True),
    "gemma2": Architecture(
        "gemma2",
        activation=_GELU,
        norms_plus_one=True,
        tied=True,
        period=2,
        scale_layers=46,
        keys=_CAPS,
    ),
    "gemma3_text": Architecture(
        "gemma3", activation=_GELU, norms_plus_one=True, period=6, scale_layers=62, keys=_CAPS[1:]
    ),
}
LITE: Final = (26, 27)  #: the numbers of layers with which llama.cpp takes a DeepSeek-V2 for one of plain queries
NO_ROPE: Final = 4  #: SmolLM3's layers of this number, and of its multiples, have no rope

#: Types of models whose sliding window llama.cpp leaves out, so that their context ends where the window does.
CAPPED: Final = ("mistral", "mixtral", "phi3")

#: Numbers that every architecture has: the configuration's key, by GGUF's name without the architecture's.
COUNTS: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """GGUF's architecture for a model.

    Raises:
        ArtifactError: GGUF has none, or its architecture computes another model.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ArtifactError(
            f"how GGUF writes a {kind!r} is not known to this qkit: known are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    if kind == "gemma" and not config.get("hidden_activation"):
        activation = architecture.activation  # transformers takes its "gelu" for this one, too
    window, most = _foreign_window(config, architecture), config.get("max_position_embeddings", 0)
    scalar, expected = config.get("query_pre_attn_scalar", _scalar(config, architecture)), _scalar(config, architecture)
    local = ropes(config).get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    ropeless = config.get("no_rope_layers")
    for wrong, feature in (
        (scalar != expected, f"query_pre_attn_scalar {scalar}, where llama.cpp takes {expected}"),
        (local != LOCAL_THETA and kind != "gemma3_text", f"a rope of theta {local} for sliding attention"),
        (activation != architecture.activation, f"hidden_act {activation!r}"),
        (window is not None and window < most and kind not in CAPPED, f"a sliding window of {window}"),
        (bool(architecture.period and kinds), f"layers of {', '.join(sorted(map(str, kinds)))}"),
        (
            bool(ropeless) and ropeless != [int((i + 1) % NO_ROPE != 0) for i in range(len(ropeless or ()))],
            "no_rope_layers",
        ),
        (bool(config.get("clip_qkv")), "clip_qkv"),
        *_of_mixtures(config, architecture),
        *_of_latent(config, architecture),
        (kind == "gpt_oss" and _slides(config) != _regular(config, architecture), "layer_types in another order"),
        (kind == "gpt_oss" and config.get("attention_bias") is False, "attention_bias False"),
        (
            architecture.name == "phi3" and head_width(config) * config["num_attention_heads"] != config["hidden_size"],
            "head_dim",
        ),
    ):
        if wrong:
            raise ArtifactError(
                f"a {kind!r} with {feature} is not one that qkit can say in GGUF: export --to mlx or --to dense"
            )
    return architecture


def numbers_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The model's numbers, by GGUF's names without the architecture's.

    Raises:
        ArtifactError: a number does not fit GGUF's type, or llama.cpp has no such rope.
        KeyError: a number is missing.
    """
    head = head_width(config)
    turned = config["qk_rope_head_dim"] if architecture.latent else head
    values = {
        **{name: config[key] for name, key in COUNTS.items()},
        **_cap(config),
        **{name: config[key] for name, key in architecture.keys if config.get(key) is not None},
        **({"attention.sliding_window": config["sliding_window"]} if architecture.period else {}),
        "attention.key_length": config["qk_nope_head_dim"] + turned if architecture.latent else head,
        "attention.value_length": config["v_head_dim"] if architecture.latent else head,
        **rope_numbers(config, architecture.name, turned),
    }
    local = ropes(config).get("sliding_attention", {}).get("rope_theta")
    if local is not None and architecture.name == "gemma3":
        values["rope.freq_base_swa"] = float(local)
    sliding = _slides(config)
    if architecture.period and sliding != _regular(config, architecture):
        values["attention.sliding_window_pattern"] = sliding
    for name, value in values.items():
        if isinstance(value, (str, list)) and name not in COUNTS:
            continue
        if type(value) not in (int, float) or not 0 <= value < MOST:
            raise ArtifactError(
                f"config.json: {value!r:.200} is no {name} of GGUF: want a number from 0 to {MOST - 1:,}"
            )
    return {name: float(value) if name in FLOATS else value for name, value in values.items()}


def head_width(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _of_mixtures(config: Mapping[str, Any], architecture: Architecture) -> list[tuple[bool, str]]:
    """Features of mixtures that llama.cpp computes otherwise: it normalizes always or never, and has experts in every layer."""
    if architecture.normalized is None:
        return []
    normalized, step = bool(config.get("norm_topk_prob", False)), config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers")
    return [
        (normalized != architecture.normalized, f"norm_topk_prob {normalized}"),
        (step != 1, f"decoder_sparse_step {step}"),
        (bool(dense), f"mlp_only_layers {dense}"),
    ]


def _slides(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has a sliding window; [] where no configuration says."""
    return [kind == "sliding_attention" for kind in config.get("layer_types") or ()]


def _regular(config: Mapping[str, Any], architecture: Architecture) -> list[bool]:
    """The same, as the period of the architecture has it."""
    return [(i + 1) % architecture.period != 0 for i in range(len(config.get("layer_types") or ()))]


def _of_latent(config: Mapping[str, Any], architecture: Architecture) -> list[tuple[bool, str]]:
    """Features of DeepSeek-V2 that llama.cpp computes otherwise: it takes the largest experts, whatever their group."""
    if not architecture.latent:
        return []
    heads, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    method, groups = config.get("topk_method") or "greedy", config.get("n_group") or 1
    layers = config.get("num_hidden_layers")
    return [
        (keys != heads, f"{keys} heads of keys and {heads} of queries"),
        (method != "greedy" and groups > 1, f"topk_method {method!r}"),
        (bool(config.get("attention_bias")), "attention_bias"),
        (config.get("q_lora_rank") is None and layers not in LITE, f"q_lora_rank None in {layers} layers"),
    ]


def _cap(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window") if config.get("model_type") in CAPPED else None
    return {} if window is None else {"context_length": min(window, config["max_position_embeddings"])}


def _foreign_window(config: Mapping[str, Any], architecture: Architecture) -> Any:
    """The sliding window that llama.cpp would leave out; None where there is none."""
    if architecture.period or (
        architecture.name in ("qwen2", "qwen3", "qwen2moe", "qwen3moe", "smollm3")
        and not config.get("use_sliding_window")
    ):
        return None
    return config.get("sliding_window")


def _scalar(config: Mapping[str, Any], architecture: Architecture) -> int:
    """The number whose root divides llama.cpp's attention."""
    if architecture.scale_layers and config.get("num_hidden_layers") == architecture.scale_layers:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_width(config)
