"""Rotary embeddings: what transformers 5 writes as `rope_parameters`, in the words that mlx-lm reads. Plain values only.

mlx-lm ignores what it does not know and uses its defaults; here that is an error instead.
"""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from qkit.errors import BackendError

KNOWN = {
    "default",
    "linear",
    "dynamic",
    "llama3",
    "yarn",
    "proportional",
}  #: types where mlx-lm computes what torch does
THETA = ("rope_theta", "rotary_emb_base")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
NESTED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor"}


def spell_rope(config: Mapping[str, Any], accepted: set[str]) -> dict[str, Any]:
    """`config` with its rotary embedding in the names `accepted` by mlx-lm; names that are there already stay.

    Raises:
        BackendError: mlx-lm computes another rotary embedding, or none of its names says this one.
    """
    known = {name: value for name, value in config.items() if value is not None}
    if isinstance(known.get("text_config"), dict):
        known["text_config"] = spell_rope(known["text_config"], NESTED)
    found = _by_attention(known)
    for rope in found.values():
        _check(rope)
    if not found or (len(found) > 1 and "rope_parameters" in accepted):
        return known  # nothing to say, or mlx-lm reads the rope of each kind of layer by itself
    if len(found) == 1:
        rope = next(iter(found.values()))
    elif found.keys() == {"full_attention", "sliding_attention"} and "rope_local_base_freq" in accepted:
        rope, local = found["full_attention"], found["sliding_attention"]
        if _type(local) != "default":
            raise BackendError(f"mlx-lm has no rope of type {_type(local)!r} for sliding attention")
        known.setdefault("rope_local_base_freq", local["rope_theta"])
        if "layer_types" in known:
            known.setdefault("sliding_window_pattern", _pattern(known["layer_types"]))
    else:
        raise BackendError(f"mlx-lm has one rope for all layers of a {known.get('model_type')!r}, not {len(found)}")
    for names, key in ((THETA, "rope_theta"), (PARTIAL, "partial_rotary_factor")):
        for name in accepted.intersection(names) if key in rope else ():
            known.setdefault(name, rope[key])
    if "rope_parameters" in accepted:
        return {**known, **({"rope_scaling": _scaling(rope, known)} if _scales(rope, known, accepted) else {})}
    partial = rope.get("partial_rotary_factor", 1.0) != 1.0 and _type(rope) != "proportional"
    if partial and not accepted.intersection(PARTIAL):
        raise BackendError(f"mlx-lm rotates all of a {known.get('model_type')!r}'s heads, not a part of them")
    if _type(rope) != "default" and "rope_scaling" not in accepted:
        raise BackendError(f"mlx-lm has no rope of type {_type(rope)!r} for a {known.get('model_type')!r}")
    if _scales(rope, known, accepted):
        known["rope_scaling"] = _scaling(rope, known)
    return known


def check_rope(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Looks at what mlx-lm built: it may read a name, and compute without it.

    Raises:
        BackendError: a rotary embedding of `model` is none of those that `config` asks for.
    """
    text = config.get("text_config")
    found = _by_attention({**config, **(text if isinstance(text, dict) else {})})
    wanted = [
        (float(rope.get("rope_theta") or config["rope_theta"]), 1 / rope["factor"] if _type(rope) == "linear" else 1.0)
        for rope in found.values()
        if _type(rope) in ("default", "linear") and (rope.get("rope_theta") or config.get("rope_theta"))
    ]
    for path, module in model.named_modules() if found else ():
        if type(module) is nn.RoPE and (float(module.base), module.scale) not in wanted:
            asked = ", ".join(f"{_type(rope)} with theta {rope.get('rope_theta')}" for rope in found.values())
            raise BackendError(f"mlx-lm gave {path} a plain rope with theta {module.base}, and the model has: {asked}")


def _by_attention(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rope of each kind of attention; one, called "all", where there is one for every layer."""
    rope = config.get("rope_parameters") or {}
    nested = {kind: value for kind, value in rope.items() if isinstance(value, dict)} or ({"all": rope} if rope else {})
    return {kind: {name: v for name, v in value.items() if v is not None} for kind, value in nested.items()}


def _type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _check(rope: Mapping[str, Any]) -> None:
    if _type(rope) == "longrope":
        if rope.get("short_factor") != rope.get("long_factor"):
            raise BackendError(
                "mlx-lm uses the long factors of a 'longrope' rope for short inputs too, and torch does not"
            )
    elif _type(rope) not in KNOWN:
        raise BackendError(f"mlx-lm has no rope of type {_type(rope)!r}: it knows {', '.join(sorted(KNOWN))}")
    if _type(rope) == "yarn" and ("attention_factor" in rope or rope.get("truncate") is False):
        raise BackendError("mlx-lm ignores attention_factor and truncate of a 'yarn' rope")


def _scales(rope: Mapping[str, Any], known: Mapping[str, Any], accepted: set[str]) -> bool:
    return _type(rope) != "default" and "rope_scaling" in accepted and "rope_scaling" not in known


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm calls `rope_scaling`; its models look for the type under either name."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if _type(rope) == "yarn" and "max_position_embeddings" in config:
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return {**scaling, "type": _type(rope), "rope_type": _type(rope)}


def _pattern(kinds: list[str]) -> int:
    """Every how many layers attention is full."""
    pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((i + 1) % pattern == 0) for i, kind in enumerate(kinds)):
        raise BackendError("mlx-lm alternates full and sliding attention regularly, and layer_types does not")
    return pattern
