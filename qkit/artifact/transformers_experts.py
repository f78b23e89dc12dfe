"""Outputs whose experts transformers 5.23 opens as other numbers without an error, and the key of config.json that stops it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from qkit.artifact.metadata import StoredRule
from qkit.experts import expert_of, is_stacked, types_of
from qkit.formats.compressed_tensors import layout
from qkit.formats.read_layout import OWN

#: A number for people, that no reader uses. transformers checks that it is one, and shows up to 50 letters of anything else.
STOPPER: Final = "global_compression_ratio"
TEXT: Final = "transformers misreads its experts: use qkit.load"
#: Types of models whose experts transformers takes apart wherever a layer is quantized.
TAKEN_APART: Final = ("llama4", "llama4_text")
OWN_TEXT: Final = "only qkit opens such codes: use qkit.load"


def misread(config: Mapping[str, Any], rules: Sequence[StoredRule], *, single_experts: bool) -> str:
    """Why transformers would open other experts than the files have, as the rest of a sentence; empty where it does not.

    Args:
        single_experts: whether there are float experts that are stored one by one.
    """
    if single_experts and rules:
        return "it drops float experts that are stored one by one beside quantized layers"
    grids = {one.rule.weight for one in rules if one.rule.kind == "experts"}
    if not grids:
        return _apart(config) if rules else ""
    if is_stacked(config):
        kind = config.get("model_type")
        return f"it has no conversion that stacks the experts of a {kind} model, and leaves them at random"
    if any(grid and layout(grid) == "nvfp4-pack-quantized" for grid in grids):
        return "it decodes experts without the scale of the tensor, so that they are wrong"
    return "it decodes all experts by the grid of the first" if len(grids) > 1 else ""


def _apart(config: Mapping[str, Any]) -> str:
    """Why transformers does not find the float experts of `config` beside quantized layers; empty where it does."""
    inner = config.get("text_config")
    layers = (inner if isinstance(inner, Mapping) else config).get("moe_layers")
    if not types_of(config) & {*TAKEN_APART} or layers == []:
        return ""
    return (
        f"it takes apart the experts of a {config.get('model_type')} beside quantized layers, and leaves them at random"
    )


def stops(config: Mapping[str, Any], rules: Sequence[StoredRule], *, single_experts: bool) -> str:
    """The text that has transformers refuse such a directory; empty where it opens the directory as it is."""
    if any(one.rule.weight and layout(one.rule.weight) == OWN for one in rules):
        return OWN_TEXT
    return TEXT if misread(config, rules, single_experts=single_experts) else ""


def has_single(names: Iterable[str]) -> bool:
    """Whether a float expert that is stored by itself is among the tensors with these names."""
    known = set(names)
    paths = (name.removesuffix(".weight") for name in known if name.endswith(".weight"))
    return any(
        expert_of(path) and f"{path}.weight_scale" not in known for path in paths
    )  # codes of 8-bit floats have one
