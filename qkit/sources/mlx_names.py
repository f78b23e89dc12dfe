"""Models of pictures and text in mlx-lm's files, which have the language model alone, under names from `language_model` on.

They are read as that language model: mlx-lm's conversion leaves the towers out. Read off mlx-lm 0.32 (`models/gemma3.py`,
`mistral3.py`, `qwen2_vl.py`, `qwen3_vl.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.mlx_config import from_mlx_name
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.mlx_types import SAME_NAMES
from qkit.sources.parts import Tensors

PREFIX: Final = "language_model."
SECTIONS: Final = ("mrope_section", "mrope_interleaved")  #: of a rotary embedding: of pictures alone
#: Types of language models inside of others: their class in transformers.
CLASSES: Final = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def renamed(
    tensors: Tensors, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Tensors, Mapping[str, Any], dict[str, Any]]:
    """The tensors and the settings of layers under the names of other files, and the configuration that belongs to them.

    Those of a language model inside of another are its own; stacks keep their names.

    Raises:
        ArtifactError: there are towers too, as other programs write them, or the language model is none that qkit reads so.
    """
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or not any(name.startswith(PREFIX) for name in tensors):
        return *_named(tensors, settings, partial(from_mlx_name, config=config)), dict(config)
    kind = language_of(config, inner)
    if other := next((name for name in tensors if not name.startswith(PREFIX)), None):
        raise ArtifactError(
            f"{other} is no part of the language model: mlx-lm writes the language model of a {config.get('model_type')!r} "
            "alone, and qkit reads no towers of pictures in MLX's layout: convert the model with mlx-lm, or take its float files"
        )
    if kind not in CLASSES or kind not in SAME_NAMES:
        outer, known = config.get("model_type"), ", ".join(sorted(CLASSES))
        raise ArtifactError(
            f"the language model of a {outer!r} is a {kind!r}, which qkit does not read alone: it reads {known}"
        )
    named, stated = _named(tensors, settings, lambda name: name.removeprefix(PREFIX))
    return named, stated, _config(config, inner, kind, named)


def _named(
    tensors: Tensors, settings: Mapping[str, Any], name_of: Callable[[str], str]
) -> tuple[Tensors, Mapping[str, Any]]:
    made = {name_of(name): replace(one, slot=replace(one.slot, name=name_of(name))) for name, one in tensors.items()}
    if len(made) < len(tensors):
        raise ArtifactError("two of its tensors have one name in other files: fetch the directory again")
    return made, {name_of(f"{key}.")[:-1]: value for key, value in settings.items()}


def language_of(config: Mapping[str, Any], inner: Mapping[str, Any]) -> str:
    """The type of the language model whose settings are `inner`, as mlx-lm builds it."""
    family = FAMILIES.get(str(config.get("model_type")))
    return (family.language if family else "") or str(inner.get("model_type"))


def _config(config: Mapping[str, Any], inner: Mapping[str, Any], kind: str, tensors: Tensors) -> dict[str, Any]:
    """The configuration of the language model, whose settings stand in `inner`, with those of `config` that belong to it."""
    outer = {
        key: config[key]
        for key in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
        if key in config
    }
    ropes = {
        key: {name: one for name, one in value.items() if name not in SECTIONS}
        for key in ("rope_parameters", "rope_scaling")
        if isinstance(value := inner.get(key), Mapping) and any(name in value for name in SECTIONS)
    }
    for rope in ropes.values():
        for name in ("rope_type", "type"):
            if rope.get(name) == "mrope":
                rope[name] = "default"
    embedding = tensors.get("model.embed_tokens.weight")
    size = {"vocab_size": embedding.slot.shape[0]} if embedding else {}
    tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
    return {**inner, **outer, **ropes, **size, **tied, "model_type": kind, "architectures": [CLASSES[kind]]}
