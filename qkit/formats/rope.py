"""Rotary embeddings: transformers 5's `rope_parameters`, translated into the keys that mlx-lm reads. Plain values only.

mlx-lm ignores unknown keys and uses its defaults. Here an unknown key is an error.
"""

from collections.abc import Collection, Mapping
from typing import Any

from qkit.errors import BackendError

#: Types that mlx-lm and transformers compute alike, but for `ignored_rope`.
KNOWN = {"default", "linear", "dynamic", "llama3", "yarn", "proportional", "longrope"}
#: Other names of types in older configurations, as transformers reads them.
OLDER = {"mrope": "default", "su": "longrope"}
WHOLE = "glm"  #: the type whose heads mlx-lm turns whole, whatever the configuration says; see `ignored_rope`
THETA = ("rope_theta", "rotary_emb_base")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
NESTED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor"}


def spell_rope(config: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """`config` with its rotary embedding under the keys `accepted` by mlx-lm. Existing keys stay.

    Raises:
        BackendError: mlx-lm computes another rotary embedding, or has no key for this one.
    """
    known = {name: value for name, value in config.items() if value is not None}
    found = ropes_of(known)
    for rope in found.values():
        _check(rope)
    if not found or (len(found) > 1 and "rope_parameters" in accepted):
        return known  # there is no rope, or mlx-lm itself reads one for each kind of layer
    if len(found) == 1 or _one_for_all(known, found):
        rope = found.get("full_attention", next(iter(found.values())))
    elif found.keys() == {"full_attention", "sliding_attention"} and "rope_local_base_freq" in accepted:
        rope, local = found["full_attention"], found["sliding_attention"]
        if rope_type(local) != "default":
            raise BackendError(f"mlx-lm has no rope of type {rope_type(local)!r} for sliding attention")
        known.setdefault("rope_local_base_freq", local["rope_theta"])
        if "layer_types" in known:
            known.setdefault("sliding_window_pattern", _pattern(known["layer_types"]))
    else:
        raise BackendError(f"mlx-lm has one rope for all layers of a {known.get('model_type')!r}, not {len(found)}")
    for names, key in ((THETA, "rope_theta"), (PARTIAL, "partial_rotary_factor")):
        for name in set(names).intersection(accepted) if key in rope else ():
            known.setdefault(name, rope[key])
    if "rope_parameters" in accepted:
        return {**known, **({"rope_scaling": _scaling(rope, known)} if _scales(rope, known, accepted) else {})}
    partial = rope.get("partial_rotary_factor", 1.0) != 1.0 and rope_type(rope) != "proportional"
    partial = partial and known.get("model_type") != WHOLE
    if partial and not set(PARTIAL).intersection(accepted):
        raise BackendError(f"mlx-lm rotates all of a {known.get('model_type')!r}'s heads, not a part of them")
    if rope_type(rope) != "default" and "rope_scaling" not in accepted:
        raise BackendError(f"mlx-lm has no rope of type {rope_type(rope)!r} for a {known.get('model_type')!r}")
    old = "original_max_position_embeddings"
    if _scales(rope, known, accepted) or old in rope.keys() - known.get("rope_scaling", {old}):
        known["rope_scaling"] = _scaling(rope, known)  # older configurations have the original length beside it
    return known


def ropes(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rope of each kind of attention; a single rope for all layers is called "all"."""
    rope = config.get("rope_parameters") or {}
    nested = {kind: value for kind, value in rope.items() if isinstance(value, dict)} or ({"all": rope} if rope else {})
    return {kind: {name: v for name, v in value.items() if v is not None} for kind, value in nested.items()}


def ropes_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """As `ropes`, also of an older configuration, which has `rope_scaling` and `rope_theta`."""
    if config.get("rope_parameters") or not (scaling := config.get("rope_scaling")):
        return ropes(config)
    older = ("rope_theta", "original_max_position_embeddings")  # where transformers puts them in
    beside = {key: config[key] for key in older if config.get(key) is not None}
    return {"all": {name: value for name, value in {**beside, **scaling}.items() if value is not None}}


def rope_type(rope: Mapping[str, Any]) -> str:
    """The type of one rope, under either of the names for it."""
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return OLDER.get(kind, kind)


def partial_factor(config: Mapping[str, Any]) -> float:
    """The part of a head that turns."""
    rope = next(iter(ropes_of(config).values()), {})
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def ignored_rope(config: Mapping[str, Any]) -> str:
    """A sentence about a part of a rope that mlx-lm ignores; empty where there is none. qkit's MLX engine computes each."""
    if config.get("model_type") == WHOLE and (part := partial_factor(config)) != 1.0:
        return f"it turns all of each head of a 'glm', and not {part:g} of it"
    for rope in ropes_of(config).values():
        kind = rope_type(rope)
        if kind == "yarn" and (rope.get("truncate") is False or rope.get("attention_factor") is not None):
            key = "truncate" if rope.get("truncate") is False else "attention_factor"
            return f"it ignores {key} of a 'yarn' rope, so that it turns queries and keys otherwise"
        if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
            return "it uses the long factors of a 'longrope' rope for short texts, too"
    return ""


def _one_for_all(config: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether mlx-lm computes all of several ropes from one: equal ones; and olmo3 scales that of full attention alone."""
    first, *others = found.values()
    if all(other == first for other in others):
        return True
    plain = found.get("sliding_attention", {})
    alike = found.keys() == {"full_attention", "sliding_attention"} and rope_type(plain) == "default"
    return bool(
        config.get("model_type") == "olmo3"
        and alike
        and plain.get("rope_theta") == found["full_attention"].get("rope_theta")
    )


def _check(rope: Mapping[str, Any]) -> None:
    if rope_type(rope) not in KNOWN:
        raise BackendError(f"mlx-lm has no rope of type {rope_type(rope)!r}: it knows {', '.join(sorted(KNOWN))}")


def _scales(rope: Mapping[str, Any], known: Mapping[str, Any], accepted: Collection[str]) -> bool:
    return rope_type(rope) != "default" and "rope_scaling" in accepted and "rope_scaling" not in known


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm's `rope_scaling`, with the type under both names, since its models read one or the other."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if rope_type(rope) == "yarn" and "max_position_embeddings" in config:
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return {**scaling, "type": rope_type(rope), "rope_type": rope_type(rope)}


def _pattern(kinds: list[str]) -> int:
    """The period of full attention, in layers.

    Raises:
        BackendError: the layers have no period.
    """
    pattern = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((i + 1) % pattern == 0) for i, kind in enumerate(kinds)):
        raise BackendError("mlx-lm alternates full and sliding attention regularly, and layer_types does not")
    return pattern
