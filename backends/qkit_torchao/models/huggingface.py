"""Models by their Hugging Face configuration. Beside `training.transformers`, the only module that imports transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qkit.errors import BackendError
from qkit.installation import how_to_install


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model that `architectures` names, else a causal language model; freshly initialised, in the configuration's type.

    Runs no code but transformers' own.

    Raises:
        BackendError: transformers is missing, or does not know the architecture.
    """
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
    except ImportError:
        raise BackendError(f"building a torch model needs transformers: {how_to_install('hf')}") from None
    try:
        known = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "transformers_version"})
        architecture = getattr(transformers, (config.get("architectures") or [""])[0], None)
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
            model: nn.Module = architecture._from_config(known, dtype=dtype)  # noqa: SLF001  transformers offers no public name for it
        else:
            model = AutoModelForCausalLM.from_config(known, dtype=dtype)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # with a stranger's numbers, transformers fails in any way
        raise BackendError(f"transformers cannot build a {config.get('model_type')!r} model: {error}") from None
    return model.eval()
