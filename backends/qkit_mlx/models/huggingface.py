"""Builds models of Hugging Face architectures, through mlx-lm. Only `mended` and `mlx_lora` import it besides."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _decode_tagged_floats, _get_classes

from qkit.errors import BackendError, QkitError
from qkit.formats.mlx_families import FAMILIES, Family, read_config
from qkit.formats.mlx_limits import without_place
from qkit.formats.mlx_types import WRONG
from qkit_mlx.models.mended import mend
from qkit_mlx.models.rope import check_rope

CONFIG = "qkit_config"  #: the attribute of a model that holds its configuration


def build(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of the architecture that `config` names; stores `config` on the model.

    Raises:
        BackendError: mlx-lm has no such architecture, the configuration lacks a key, or mlx-lm computes another model, which
            `mended` does not mend.
    """
    if "model_type" not in config:
        raise BackendError("the configuration has no model_type: mlx-lm finds the architecture by it, so add it")
    if why := WRONG.get(config["model_type"]):
        raise BackendError(
            f"mlx-lm computes another {config['model_type']!r} than transformers: {why}; use another engine"
        )
    if text := next(without_place(config), ""):
        raise BackendError(f"mlx-lm cannot compute this model: {text}; use another engine")
    decoded = {name: _decode_tagged_floats(deepcopy(value)) for name, value in config.items()}
    present = {name: value for name, value in decoded.items() if value is not None}
    try:
        model_class, arguments = _get_classes(present)
        family = FAMILIES.get(present["model_type"]) or Family(set(inspect.signature(arguments).parameters))
        model: nn.Module = model_class(arguments.from_dict(read_config(decoded, family=family)))
    except (QkitError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # mlx-lm raises any error for a configuration that it does not expect
        rope = f" with {present['rope_parameters']}" if "rope_parameters" in present else ""
        raise BackendError(f"mlx-lm cannot build a {config['model_type']!r}{rope}: {error}") from None
    check_rope(model, present)
    mend(model, present)
    model.set_dtype(getattr(mx, str(config.get("dtype") or config.get("torch_dtype") or "float32")))
    object.__setattr__(model, CONFIG, dict(config))  # Module's own would store a dict among the parameters
    return model
