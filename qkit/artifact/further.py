"""Tensors that predict tokens after the next one. Checkpoints hold them, and no class of transformers or mlx-lm builds them."""

import re
from collections.abc import Mapping
from typing import Any

NAMED = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
NUMBERED = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
REASON = "predicts further tokens, and readers leave it out"


def predicts_further(name: str, config: Mapping[str, Any] | None) -> bool:
    """Whether the tensor `name` is in a module called `mtp`, or in a hidden layer after those that `config` counts.

    Qwen, MiMo and Ernie name such modules; DeepSeek and GLM count on, with `num_nextn_predict_layers`.
    """
    if NAMED.search(name):
        return True
    found = NUMBERED.match(name)
    count = ((config or {}).get("text_config") or config or {}).get("num_hidden_layers")
    return found is not None and isinstance(count, int) and int(found[1]) >= count
