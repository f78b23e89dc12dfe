"""Models by their Hugging Face configuration. The only module that imports transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qkit.errors import BackendError


def build(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model, freshly initialised, in the type that the configuration names. Runs no code but transformers'.

    Raises:
        BackendError: transformers is missing, or does not know the architecture.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise BackendError("building a torch model needs transformers: pip install 'qkit[hf]'") from None
    try:
        known = AutoConfig.for_model(**config)
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        model: nn.Module = AutoModelForCausalLM.from_config(known, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"transformers cannot build a {config.get('model_type')!r} model: {error}") from None
    return model.eval()
