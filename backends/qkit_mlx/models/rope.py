"""Checks that the rotary embeddings of a model that mlx-lm built are those of its configuration; see `qkit.formats.rope`."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from qkit.errors import BackendError
from qkit.formats.rope import rope_type, ropes_of


def check_rope(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Checks the rotary embeddings of `model`: mlx-lm may read the name of a kind and ignore it.

    Raises:
        BackendError: a rotary embedding of `model` is not in `config`.
    """
    text = config.get("text_config")
    found = ropes_of({**config, **(text if isinstance(text, dict) else {})})
    wanted = [
        (
            float(rope.get("rope_theta") or config["rope_theta"]),
            1 / rope["factor"] if rope_type(rope) == "linear" else 1.0,
        )
        for rope in found.values()
        if rope_type(rope) in ("default", "linear") and (rope.get("rope_theta") or config.get("rope_theta"))
    ]
    for path, module in model.named_modules() if found else ():
        if type(module) is nn.RoPE and (float(module.base), module.scale) not in wanted:
            asked = ", ".join(f"{rope_type(rope)} with theta {rope.get('rope_theta')}" for rope in found.values())
            raise BackendError(f"mlx-lm gave {path} a plain rope with theta {module.base}, and the model has: {asked}")
