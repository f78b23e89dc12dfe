"""Settings of a model that mlx-lm ignores, or has no place for, by type of model. Read off mlx-lm 0.32.2."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Config = Mapping[str, Any]
BOTH: Final = ("qkit, MLX", "mlx-lm")
ENGINE: Final = ("qkit, MLX",)


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
LIMITS: Final[Mapping[str, tuple[Limit, ...]]] = {
    "qwen3": (BIASES,),
    "gemma": (UNTIED, BIASES),
    "gemma2": (UNTIED, BIASES),
    "phi": (TIED, Limit("qk_layernorm", (True,))),
    "stablelm": (TIED,),
    "glm4": (TIED,),
    "gpt_neox": (TIED,),
    "gpt2": (UNTIED,),
    "starcoder2": (Limit("use_bias", (False,)),),
    "qwen2_moe": (Limit("mlp_only_layers"),),
    "deepseek_v2": (Limit("q_lora_rank", (None,), ENGINE),),
    "deepseek_v3": (Limit("q_lora_rank", (None,), ENGINE),),
}
#: Types whose sliding windows mlx-lm ignores: every token sees all before it.
WINDOWLESS: Final = ("mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")


def limits_of(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """The readers that a setting of `config` concerns, and a sentence about each such setting."""
    kind = str(config.get("model_type"))
    for limit in LIMITS.get(kind, ()):
        if limit.meets(config):
            yield limit.readers, f"it has no place for {limit.key} = {config[limit.key]!r} of a {kind!r}"
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    if kind == "mixtral" and width and heads and width * heads != config.get("hidden_size"):
        yield BOTH, f"it has no place for head_dim = {width!r} of a {kind!r}"
    if text := ignored_window(config):
        yield BOTH, text


def ignored_window(config: Config) -> str:
    """A sentence about a sliding window that mlx-lm ignores; empty where there is none, or no text is longer."""
    kind = str(config.get("model_type"))
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    slides = config.get("use_sliding_window", True) and "sliding_attention" in (
        config.get("layer_types") or ["sliding_attention"]
    )
    if kind in WINDOWLESS and slides and isinstance(window, int) and (not isinstance(longest, int) or window < longest):
        return f"it ignores the sliding window of a {kind!r}, so that texts of more than {window} tokens give other results"
    return ""
