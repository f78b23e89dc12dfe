"""What GGUF makes of a model's configuration: its architecture and its numbers, or why it has none for it. Plain values only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.rope import rope_type, ropes

LOCAL_THETA: Final = 10000.0  #: of the rope of sliding attention, which GGUF has no word for
MOST: Final = 1 << 32  #: GGUF's counts are smaller


@dataclass(frozen=True, slots=True)
class Architecture:
    """What GGUF makes of a type of model.

    Attributes:
        name: its own.
        activation: the only one it computes.
        interleaved: whether the rows of queries and keys are in the order of complex pairs.
        norms_plus_one: whether norms hold 1 + w.
        keys: further numbers of a configuration, by GGUF's name less the architecture's.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norms_plus_one: bool = False
    keys: tuple[tuple[str, str], ...] = ()


_GEMMA = (("attention.sliding_window", "sliding_window"),)
ARCHITECTURES: Final = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture(
        "gemma2",
        activation="gelu_pytorch_tanh",
        norms_plus_one=True,
        keys=(
            *_GEMMA,
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
    ),
    "gemma3_text": Architecture("gemma3", activation="gelu_pytorch_tanh", norms_plus_one=True, keys=_GEMMA),
}

#: Numbers of a configuration by GGUF's name, less the architecture's; every architecture has them.
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
    """The architecture of a model, if GGUF's computes the same."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ArtifactError(
            f"how GGUF writes a {kind!r} is not known to this qkit: known are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    scaled = [rope_type(rope) for rope in ropes(config).values() if rope_type(rope) != "default"]
    window = config.get("sliding_window") if architecture.name == "llama" or config.get("use_sliding_window") else None
    scalar = config.get("query_pre_attn_scalar", head_width(config))
    local = ropes(config).get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    for wrong, what in (
        (scalar != head_width(config), f"query_pre_attn_scalar {scalar}, which is not its head_dim"),
        (local != LOCAL_THETA, f"a rope of theta {local} for sliding attention"),
        (activation != architecture.activation, f"hidden_act {activation!r}"),
        (bool(scaled), f"a rope of type {scaled[0] if scaled else None!r}"),
        (window is not None, f"a sliding window of {window}"),
    ):
        if wrong:
            raise ArtifactError(
                f"a {kind!r} with {what} is not one that qkit can say in GGUF: export --to mlx or --to dense"
            )
    return architecture


def numbers_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The model's numbers, by GGUF's names less the architecture's.

    Raises:
        ArtifactError: one is none that GGUF holds.
        KeyError: one is missing.
    """
    head = head_width(config)
    values = {
        **{name: config[key] for name, key in COUNTS.items()},
        **{name: config[key] for name, key in architecture.keys if config.get(key) is not None},
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(_rope(config).get("rope_theta") or config.get("rope_theta", 10000.0)),
    }
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < MOST:
            raise ArtifactError(
                f"config.json: {value!r:.200} is no {name} of GGUF: want a number from 0 to {MOST - 1:,}"
            )
    return values


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of full attention, which is the one that GGUF says."""
    found = ropes(config)
    return found.get("full_attention") or next(iter(found.values()), {})


def head_width(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
