"""Rotary embeddings for GGUF: transformers 5's `rope_parameters` as llama.cpp's keys and tables of factors.

Read off llama.cpp 0.5 (`llama-context.cpp`, `conversion/llama.py`) and transformers 5.23 (`modeling_rope_utils.py`).
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.rope import rope_type, ropes

TABLES: Final = {"llama", "granite"}  #: architectures of which llama.cpp reads a table of factors
KNOWN: Final = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {
        "rope_theta",
        "short_factor",
        "long_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
    },
}  #: parameters of each type that llama.cpp has
#: Parameters of yarn that it has besides, or that it ignores with a note, by architecture.
MORE: Final = {"deepseek2": {"mscale", "mscale_all_dim"}, "gpt-oss": {"truncate"}}


DEFAULT_THETA: Final = {"gemma3_text": 1e6, "smollm3": 2e6}  #: of transformers' configurations; all others have 10,000


def with_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with transformers 5's `rope_parameters`, which older configurations spell with three other keys."""
    if config.get("rope_parameters"):
        return dict(config)
    kind = config.get("model_type")
    theta = config.get("rope_theta") or DEFAULT_THETA.get(str(kind), 10000.0)
    rope = {"rope_theta": theta, **(config.get("rope_scaling") or {})}
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq") or 10000.0}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {**config, "rope_parameters": rope}


def rope_numbers(config: Mapping[str, Any], architecture: str, head: int) -> dict[str, Any]:
    """llama.cpp's keys for the rope of full attention, without the architecture's name.

    Raises:
        ArtifactError: llama.cpp computes another rope.
    """
    rope = rope_of(config)
    kind, partial = rope_type(rope), rope.get("partial_rotary_factor", 1.0)
    known = KNOWN.get(kind, set()) | {"rope_type", "type", "partial_rotary_factor"}
    known |= MORE.get(architecture, set()) if kind == "yarn" else set()
    strange = next((name for name in rope if name not in known), None)
    scaled = rope.get("mscale_all_dim") if kind == "yarn" and architecture == "deepseek2" else None
    wrong = (
        (kind == "yarn" and architecture == "deepseek2" and (not scaled or rope.get("mscale") != scaled))
        or (kind == "llama3" and architecture not in TABLES)
        or (kind == "longrope" and architecture != "phi3")
        or (partial != 1.0 and architecture != "phi3")
        or any(rope_type(one) != "default" for name, one in ropes(config).items() if name == "sliding_attention")
    )
    if kind not in KNOWN or strange is not None or wrong:
        detail = f" and {strange}" if kind in KNOWN and strange else ""
        raise ArtifactError(
            f"a {config.get('model_type')!r} with a rope of type {kind!r}{detail} is not one that qkit can say in GGUF: export "
            "--to mlx or --to dense"
        )
    numbers: dict[str, Any] = {
        "rope.dimension_count": int(head * partial),
        "rope.freq_base": _theta(rope, config),
    }
    if kind in ("default", "llama3"):
        return numbers
    numbers["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        numbers["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        numbers.update(_yarn(rope, config))
    if scaled:
        numbers["rope.scaling.yarn_log_multiplier"] = 0.1 * scaled  # llama.cpp takes one for both
    if kind == "longrope":
        numbers.update(_long(rope, config))
    return numbers


def ignored_truncation(config: Mapping[str, Any]) -> str:
    """A sentence where llama.cpp rounds the ends of yarn's range, and transformers does not; empty where both do."""
    rope = rope_of(with_ropes(config))
    if rope_type(rope) != "yarn" or rope.get("truncate") is not False:
        return ""
    return "llama.cpp ignores truncate = false of a 'yarn' rope, so that it turns queries and keys otherwise than transformers"


def rope_tables(config: Mapping[str, Any], head: int) -> dict[str, NDArray[np.float32]]:
    """Factors that divide the frequencies of a head of this width, float32 [width // 2], by the name of GGUF's tensor."""
    rope = rope_of(config)
    kind, width = rope_type(rope), int(head * rope.get("partial_rotary_factor", 1.0))
    if kind == "longrope":
        tables = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.asarray(table, np.float32) for name, table in tables.items()}
    if kind != "llama3":
        return {}
    theta = _theta(rope, config)
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    waves = 2 * math.pi / frequencies
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = (old / waves - low) / (high - low)
    between = 1.0 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(waves < old / high, 1.0, np.where(waves > old / low, rope["factor"], between))
    return {"rope_freqs.weight": factors.astype(np.float32)}


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of full attention."""
    found = ropes(config)
    return found.get("full_attention") or next(iter(found.values()), {})


def _theta(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "rope.scaling.original_context_length": int(
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if rope.get("attention_factor") is not None:  # llama.cpp multiplies its own factor by the stored one
        own = 1.0 + 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 1.0
        numbers["rope.scaling.attn_factor"] = float(rope["attention_factor"]) / own
    return numbers


def _long(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    most = config["max_position_embeddings"]
    old = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or most
    factor = rope.get("factor") or most / old
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
    return {"rope.scaling.original_context_length": int(old), "rope.scaling.attn_factor": float(attention)}
