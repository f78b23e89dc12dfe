"""Activations that mlx-lm computes, by type of model, beside those that a configuration asks for. Read off mlx-lm 0.32.2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Config = Mapping[str, Any]

#: Names of one function in transformers' `ACT2FN`, and the name that qkit gives it.
ALIKE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu by tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
}
GELUS: Final = ("gelu", "gelu by tanh")


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation of a type of model in mlx-lm, which reads no name of it.

    Attributes:
        computed: by mlx-lm, under qkit's name.
        default: transformers' own where the configuration has no name.
        key: of the configuration.
    """

    computed: str
    default: str
    key: str = "hidden_act"


SILU: Final = Activation("silu", "silu")
#: Types of models with another activation than `SILU`; None where both programs have no choice.
ACTIVATIONS: Final[Mapping[str, Activation | None]] = {
    "gemma": Activation("gelu", "gelu_pytorch_tanh"),
    "starcoder2": Activation("gelu", "gelu_pytorch_tanh"),
    "gpt_bigcode": Activation("gelu", "gelu_pytorch_tanh", "activation_function"),
    "gpt_neox": Activation("gelu by tanh", "gelu"),
    "phi": Activation("gelu by tanh", "gelu_new"),
    **dict.fromkeys(("gpt2", "gptj"), Activation("gelu by tanh", "gelu_new", "activation_function")),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma4_text"), Activation("gelu by tanh", "gelu_pytorch_tanh", "hidden_activation")
    ),
    "nemotron": Activation("relu2", "relu2"),
    "nemotron_h": Activation("relu2", "relu2", "mlp_hidden_act"),
    **dict.fromkeys(("apertus", "lfm2", "lfm2_moe"), None),
}
#: Types of models whose blocks qkit's MLX engine gives the activation that the configuration asks for.
MENDED: Final = ("gemma", "starcoder2", "gpt_bigcode", "gpt_neox")


def asked(config: Config, kind: str) -> str:
    """The activation that `config` asks for, under qkit's name; empty where there is no choice."""
    if (known := ACTIVATIONS.get(kind, SILU)) is None:
        return ""
    name = str(config.get(known.key) or known.default)
    return ALIKE.get(name, name)


def is_near(config: Config, kind: str) -> bool:
    """Whether mlx-lm computes one form of gelu and `config` asks for the other, which moves logits by some 2e-4."""
    known = ACTIVATIONS.get(kind, SILU)
    return known is not None and {known.computed, asked(config, kind)} == set(GELUS)


def other_activation(config: Config, kind: str) -> str:
    """A sentence about the activation that mlx-lm computes instead of the one in `config`; empty where both are one.

    Args:
        config: of a language model.
        kind: its type in mlx-lm.
    """
    known, wanted = ACTIVATIONS.get(kind, SILU), asked(config, kind)
    if known is None or wanted == known.computed:
        return ""
    moved = ", which moves logits by some 2e-4" if is_near(config, kind) else ""
    return f"it computes {known.computed} in a {kind!r} and not {wanted}, as {known.key} asks{moved}"
