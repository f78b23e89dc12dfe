"""Types of models that mlx-lm builds: those whose tensors keep their names, and those that it computes otherwise."""

from collections.abc import Mapping
from typing import Final

#: Types of models whose tensors mlx-lm leaves as they are in files, besides stacks of experts and heads: imports from mlx-lm.
SAME_NAMES: Final = frozenset(
    (
        *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "olmo2"),
        *(
            "olmo3",
            "phi",
            "phi3",
            "stablelm",
            "cohere",
            "cohere2",
            "starcoder2",
            "nemotron",
            "helium",
            "glm4",
            "ernie4_5",
        ),
        *("granite", "smollm3", "exaone4", "seed_oss", "hunyuan_v1_dense"),
        *("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "glm4_moe_lite", "deepseek_v2"),
        *("deepseek_v3", "phimoe", "exaone_moe", "solar_open", "mellum", "minimax_m2", "afmoe"),
    )
)

#: Types of models that mlx-lm builds, with other logits than transformers' or another layout of files: the difference.
WRONG: Final[Mapping[str, str]] = {
    "deepseek_v32": "its sparse attention differs (0.18 of the largest logit)",
    "falcon_h1": "it multiplies weights by constants when it reads them, which quantized ones are not",
    "llama4_text": "it has no experts",
    "minimax": "its attention is that of minimax_m2",
    "minimax_m3_vl": "0.5 of the largest logit",
    "olmo": "it wants the package ai2-olmo, and other names",
}

#: Types of models that mlx-lm computes otherwise, and qkit's MLX engine as transformers does.
OTHERWISE: Final[Mapping[str, str]] = {
    "ernie4_5_moe": "it leaves out the biases of the choice of experts",
    "glm": "it turns all of each head, not half of it",
    "jamba": "the weights of a token's experts sum to one",
}
