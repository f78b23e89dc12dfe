"""Models of Hugging Face architectures, through mlx-lm. The only module that imports it."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from qkit.errors import BackendError
from qkit.formats.rope import spell_rope
from qkit_mlx.models.rope import check_rope

CONFIG = "qkit_config"  #: attribute of a model: the configuration it was built from


def build(config: Mapping[str, Any]) -> nn.Module:
    """A model of the architecture that `config` names, freshly initialised, that remembers `config`.

    Raises:
        BackendError: mlx-lm has no such architecture, or the configuration lacks something that it needs, or asks for
            rotary embeddings that mlx-lm computes otherwise.
    """
    if "model_type" not in config:
        raise BackendError("the configuration has no model_type: mlx-lm finds the architecture by it")
    given = {name: deepcopy(value) for name, value in config.items() if value is not None}
    try:
        model_class, arguments = _get_classes(given)
        known = spell_rope(given, set(inspect.signature(arguments).parameters))
        model: nn.Module = model_class(arguments.from_dict(known))
    except (BackendError, OSError, MemoryError):
        raise
    except Exception as error:  # with a stranger's numbers, mlx-lm fails in any way
        rope = f" with {given['rope_parameters']}" if "rope_parameters" in given else ""
        raise BackendError(f"mlx-lm cannot build a {config['model_type']!r}{rope}: {error}") from None
    check_rope(model, given)
    model.set_dtype(getattr(mx, str(config.get("dtype") or config.get("torch_dtype") or "float32")))
    object.__setattr__(model, CONFIG, dict(config))  # Module's own would take a dict for parameters
    return model
