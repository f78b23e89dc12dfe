"""Builds models of Hugging Face architectures, through mlx-lm. No other module imports mlx-lm."""

import inspect
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gpt_neox import MLP
from mlx_lm.utils import _decode_tagged_floats, _get_classes

from qkit.errors import BackendError, FamilyWarning, QkitError
from qkit.formats.mlx_families import FAMILIES, WRONG, Family, read_config
from qkit.formats.mlx_limits import ignored_window
from qkit_mlx.models.rope import check_rope

CONFIG = "qkit_config"  #: the attribute of a model that holds its configuration


def build(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of the architecture that `config` names; stores `config` on the model.

    Raises:
        BackendError: mlx-lm has no such architecture, the configuration lacks a key, or mlx-lm computes its rotary embeddings
            otherwise.
    """
    if "model_type" not in config:
        raise BackendError("the configuration has no model_type: mlx-lm finds the architecture by it, so add it")
    if why := WRONG.get(config["model_type"]):
        raise BackendError(
            f"mlx-lm computes another {config['model_type']!r} than transformers: {why}; use another engine"
        )
    present = {name: _decode_tagged_floats(deepcopy(value)) for name, value in config.items() if value is not None}
    try:
        model_class, arguments = _get_classes(present)
        family = FAMILIES.get(present["model_type"]) or Family(set(inspect.signature(arguments).parameters))
        model: nn.Module = model_class(arguments.from_dict(read_config(present, family=family)))
    except (QkitError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # mlx-lm raises any error for a configuration that it does not expect
        rope = f" with {present['rope_parameters']}" if "rope_parameters" in present else ""
        raise BackendError(f"mlx-lm cannot build a {config['model_type']!r}{rope}: {error}") from None
    check_rope(model, present)
    if text := ignored_window(present):
        warnings.warn(f"mlx-lm {text.removeprefix('it ')}", FamilyWarning, stacklevel=2)
    if family.approximates and present.get("hidden_act", family.approximates) == family.approximates:
        for module in model.modules():
            if type(module) is MLP:
                module.__class__ = _ExactMLP
    model.set_dtype(getattr(mx, str(config.get("dtype") or config.get("torch_dtype") or "float32")))
    object.__setattr__(model, CONFIG, dict(config))  # Module's own would store a dict among the parameters
    return model


class _ExactMLP(MLP):
    """The block of a GPT-NeoX whose activation is gelu itself; mlx-lm's own approximates it."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(nn.gelu(self.dense_h_to_4h(x)))
