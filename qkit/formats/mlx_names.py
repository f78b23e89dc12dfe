"""Patterns of tensor names that differ between files and mlx-lm; see `Family.names` and `Family.modules` in `mlx_families`."""

from typing import Final

#: Names of a dense block in files and in mlx-lm.
NUMBERS: Final = tuple(
    (rf"(?<=feed_forward\.){number}\.", f"{name}.", rf"(?<=feed_forward\.){name}\.", f"{number}.")
    for number, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
)

DENSE: Final = tuple(
    (rf"(?<=feed_forward\.){name}\b", number)
    for number, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
)
GPT: Final = ((r"^model\.", "transformer."),)
NEOX: Final = (
    (r"^model\.embed_out\b", "lm_head"),
    (r"^model\.h\.", "gpt_neox.layers."),
    (r"^model\.", "gpt_neox."),
)
#: Names of a language model beside towers: as transformers' modules have them, and as files and mlx-lm do.
TOWERS: Final = (
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", "", r"^(?!)", ""),
    (r"^model\.language_model\.", "language_model.model.", r"^(?!)", ""),
    (r"^lm_head\.", "language_model.lm_head.", r"^(?!)", ""),
)
#: The same, where files have the names of modules.
NESTED_NAMES: Final = (
    (r"^model\.visual\.", "visual.", r"^visual\.", "model.visual."),
    (r"^model\.language_model\.", "language_model.model.", r"^language_model\.model\.", "model.language_model."),
    (r"^lm_head\.", "language_model.lm_head.", r"^language_model\.lm_head\.", "lm_head."),
)
#: Paths of modules of such a model, as transformers has them.
NESTED_MODULES: Final = (
    (r"^language_model\.model\b", "model.language_model"),
    (r"^language_model\.lm_head\b", "lm_head"),
)
#: The same, where published files name the language model as if it were alone.
ALONE: Final = (
    *((pattern, text, r"^(?!)", "") for pattern, text, _, _ in NESTED_NAMES[:2]),
    (r"^model\.", "language_model.model.", r"^language_model\.model\.", "model."),
    NESTED_NAMES[2],
)
