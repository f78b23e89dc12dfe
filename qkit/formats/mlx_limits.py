"""Settings of a model that mlx-lm ignores, or has no place for, by type of model. Read off mlx-lm 0.32.2."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkit.formats.mlx_activations import MENDED, is_near, other_activation
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.rope import ignored_rope

Config = Mapping[str, Any]
BOTH: Final = ("qkit, MLX", "mlx-lm")
ENGINE: Final = ("qkit, MLX",)
MLX_LM: Final = ("mlx-lm",)


@dataclass(frozen=True, slots=True)
class Limit:
    """A setting whose value mlx-lm has no place for.

    Attributes:
        key: of the configuration.
        values: those that it has no place for; empty for every value that is true.
        readers: the readers that do not open such a model.
    """

    key: str
    values: tuple[Any, ...] = ()
    readers: tuple[str, ...] = BOTH

    def meets(self, config: Config) -> bool:
        """Whether `config` has such a value."""
        if self.key not in config:
            return False
        value = config[self.key]
        return value in self.values if self.values else bool(value)


TIED, UNTIED = Limit("tie_word_embeddings", (True,)), Limit("tie_word_embeddings", (False,))
BIASES = Limit("attention_bias", (True,))
CAPS = (Limit("final_logit_softcapping", (None,)), Limit("attn_logit_softcapping", (None,)))
LIMITS: Final[Mapping[str, tuple[Limit, ...]]] = {
    "qwen3": (BIASES,),
    "gemma": (UNTIED, BIASES),
    "gemma2": (UNTIED, BIASES, *CAPS),
    "phi": (TIED, Limit("qk_layernorm", (True,))),
    "stablelm": (TIED,),
    "glm4": (TIED,),
    "gpt_neox": (TIED,),
    "gpt_oss": (TIED,),
    "gpt2": (UNTIED,),
    "starcoder2": (Limit("use_bias", (False,)),),
    "qwen2_moe": (Limit("mlp_only_layers"),),
}
#: Types with gated norms that mlx-lm computes of all groups together, and the key of their number. qkit's engine has groups.
GROUPS: Final[Mapping[str, str]] = {"mamba2": "n_groups", "granitemoehybrid": "mamba_n_groups"}
#: Types whose sliding windows mlx-lm ignores: every token sees all before it. qkit's MLX engine gives them their windows.
WINDOWLESS: Final = ("mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
SOMETIMES: Final = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")  #: those that slide where `use_sliding_window` says so
#: Names of classes with an output head over the vocabulary.
WITH_HEAD: Final = re.compile("ForCausalLM|LMHeadModel|ForConditionalGeneration")
LISTED: Final = ("qwen2", "qwen2_moe", "qwen3")  #: those whose layers slide one by one, by `layer_types`


def limits_of(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """The readers that a setting of `config` concerns, and a sentence about each such setting."""
    kind = str(config.get("model_type"))
    for limit in LIMITS.get(kind, ()):
        if limit.meets(config):
            yield limit.readers, f"it has no place for {limit.key} = {config[limit.key]!r} of a {kind!r}"
    names = config.get("architectures") or []
    if kind in FAMILIES and names and not any(WITH_HEAD.search(str(name)) for name in names):
        yield BOTH, f"it has language models alone, and this is a {names[0]!r}"
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    if kind == "mixtral" and width and heads and width * heads != config.get("hidden_size"):
        yield BOTH, f"it has no place for head_dim = {width!r} of a {kind!r}"
    if text := ignored_window(config):
        yield MLX_LM, text
    kind, inner = language(config)
    if (groups := groups_of(inner)) > 1:
        yield MLX_LM, f"it normalizes the {groups} groups of the states of a {kind!r} together"
    if kind == "gemma4_text" and inner.get("enable_moe_block"):
        yield BOTH, f"the stacks of experts of a {kind!r} are not known to this qkit"
    if kind in FAMILIES and (text := ignored_rope(inner)):
        yield MLX_LM, text
    if kind in FAMILIES and (text := other_activation(inner, kind)):
        yield MLX_LM if kind in MENDED and is_near(inner, kind) else BOTH, text


def without_place(config: Config) -> Iterator[str]:
    """Sentences about the settings of `config` that qkit's MLX engine has no place for either."""
    return (text for readers, text in limits_of(config) if ENGINE[0] in readers)


def language(config: Config) -> tuple[str, Config]:
    """The type in mlx-lm of the language model that `config` describes, and its own settings."""
    kind = str(config.get("model_type"))
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return (FAMILIES[kind].language or kind) if kind in FAMILIES else kind, config
    return (FAMILIES[kind].language if kind in FAMILIES else "") or str(inner.get("model_type")), inner


def sliding_layers(config: Config) -> tuple[int, list[bool]]:
    """The length of the sliding window that mlx-lm ignores, and for each layer whether it has one; (0, []) without any.

    The rules of transformers 5.23 for each type of `WINDOWLESS`, read off its `configuration_*.py`.
    """
    kind, config = language(config)
    window = config.get("sliding_window")
    count = int(config.get("num_hidden_layers") or 0)
    if kind not in WINDOWLESS or (kind in SOMETIMES and not config.get("use_sliding_window")):
        return 0, []
    if "sliding_window" not in config and kind in (*SOMETIMES, "mistral"):
        window = 4096  # transformers' default
    if not isinstance(window, int) or window <= 0:
        return 0, []
    kinds = config.get("layer_types") if kind in LISTED else None
    if kinds is not None:
        slides = [one == "sliding_attention" for one in kinds]
    elif kind == "qwen2_moe":
        slides = [i % 2 == 0 and i < config.get("max_window_layers", 28) for i in range(count)]
    elif kind in LISTED:
        slides = [i >= config.get("max_window_layers", 28) for i in range(count)]
    else:
        slides = [True] * count
    return (window, slides) if any(slides) else (0, [])


def groups_of(config: Config) -> int:
    """The number of groups of states whose norms mlx-lm joins."""
    key = GROUPS.get(str(config.get("model_type")))
    return int(config.get(key) or 1) if key else 1


def ignored_window(config: Config) -> str:
    """A sentence about a sliding window that mlx-lm ignores; empty where there is none, or no text is longer."""
    window, _ = sliding_layers(config)
    kind, inner = language(config)
    longest = inner.get("max_position_embeddings")
    if not window or (isinstance(longest, int) and window >= longest):
        return ""
    return f"it ignores the sliding window of a {kind!r}, so that texts of more than {window} tokens give other results"
