"""Frequencies and factors of scaled rotary embeddings, as transformers 5.23 computes them (`modeling_rope_utils.py`)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError

Config = Mapping[str, Any]
Waves = NDArray[np.float32]


def yarn_waves(rope: Config, config: Config, *, width: int) -> Waves:
    """The wave of each pair of a head's numbers in tokens over 2 pi, the inverse of its frequency. Float32 [width // 2].

    Args:
        rope: of type "yarn".
        config: of the language model.
        width: of the part of a head that turns.
    """
    theta, waves = _theta(rope, config), plain_waves(rope, config, width=width)
    length = original_length(rope, config)
    ends = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    low, high = (width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in ends)
    nested = any(isinstance(one, Mapping) for one in (config.get("rope_parameters") or {}).values())
    if nested or rope.get("truncate", True):  # of several ropes, transformers looks for the key beside them
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0.0
    slow = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    frequencies = slow / (np.float32(rope["factor"]) * waves) + (1 - slow) / waves
    return np.asarray(1 / frequencies, np.float32)


def yarn_factor(rope: Config) -> float:
    """The factor of queries and of keys with a `rope` of type "yarn"."""

    def scaled(by: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * by * math.log(rope["factor"]) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scaled(rope["mscale"]) / scaled(rope["mscale_all_dim"])
    return scaled(1.0)


def plain_waves(rope: Config, config: Config, *, width: int) -> Waves:
    """As `yarn_waves`, of a rope that is not scaled."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (np.float32(_theta(rope, config)) ** exponents).astype(np.float32)


def long_factor(rope: Config, config: Config) -> float:
    """The factor of queries and of keys with a `rope` of type "longrope"."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    length = original_length(rope, config)
    factor = rope.get("factor") or config["max_position_embeddings"] / length
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


def original_length(rope: Config, config: Config) -> int:
    """The longest text of the model before its rope was scaled, in tokens."""
    key = "original_max_position_embeddings"
    return int(rope.get(key) or config.get(key) or config["max_position_embeddings"])


def _theta(rope: Config, config: Config) -> float:
    if (theta := rope.get("rope_theta") or config.get("rope_theta")) is None:
        raise ArtifactError("config.json scales a rope and has no rope_theta: add that of the model")
    return float(theta)
