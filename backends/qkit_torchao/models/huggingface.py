"""Models by their Hugging Face configuration. Beside `names` and `training.transformers`, the only module with transformers."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from qkit.artifact.config import quantized_config
from qkit.artifact.metadata import KEY, describe
from qkit.artifact.save import contents
from qkit.engines.protocol import Modules
from qkit.errors import BackendError
from qkit.installation import how_to_install


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model that `architectures` names, else a causal language model; freshly initialised, in the configuration's type.

    Modules that transformers asks for in float32 are in float32, as `from_pretrained` has them. Runs no code but
    transformers' own.

    Raises:
        BackendError: transformers is missing, or does not know the architecture.
    """
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
    except ImportError:
        raise BackendError(f"building a torch model needs transformers: {how_to_install('cuda')}") from None
    try:
        present = {
            key: value for key, value in config.items() if key != "transformers_version" and not _is_absent(key, value)
        }
        known = AutoConfig.for_model(**_with_floats(present))
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
    return _with_float32(model, dtype).eval()


def uninitialized() -> AbstractContextManager[None]:
    """Within, models are built without values for their weights.

    Raises:
        BackendError: transformers is missing.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        raise BackendError(f"building a torch model needs transformers: {how_to_install('cuda')}") from None
    return cast(AbstractContextManager[None], no_init_weights())


def save_as_artifact(model: Any, engine: Modules) -> None:
    """Has `save_pretrained` write an artifact while layers of `model` are converted: transformers asks a quantizer for it."""
    own = _quantizer_class()
    before = getattr(model, "hf_quantizer", None)
    converted = any(layer.stage == "converted" for layer in engine.layers(model))
    if converted and before is None:
        model.hf_quantizer = _quantizer(engine)
    elif not converted and isinstance(before, own):
        del model.hf_quantizer


def _quantizer(engine: Modules) -> Any:
    return _quantizer_class()(engine)


@cache
def _quantizer_class() -> Any:
    from transformers.quantizers.base import HfQuantizer

    class ArtifactQuantizer(HfQuantizer):
        """Gives transformers the tensors, the metadata and the configuration of an artifact, when it saves a model."""

        def __init__(self, engine: Modules) -> None:
            self.engine, self.pre_quantized = engine, True
            self.quantization_config: Any = None

        def __reduce__(self) -> Any:
            return _quantizer, (self.engine,)  # no module names the class

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
            known = self.engine.config(model)
            found = contents(self.engine, model, known)
            config = quantized_config(known, found.rules, left_alone=found.left_alone) or {}
            model.config.quantization_config = config["quantization_config"]
            tensors = {name: self.engine.from_numpy(array) for name, array in found.tensors.items()}
            return tensors, {KEY: describe(found.rules)}

    return ArtifactQuantizer


def _is_absent(key: str, value: Any) -> bool:
    """Whether a key of a configuration says nothing; transformers fails on some that are null."""
    return value is None and key in ("rope_scaling", "rope_parameters", "dtype", "torch_dtype")


def _with_floats(value: Any) -> Any:
    """`value` with the floats that JSON cannot hold, as transformers writes them: `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        return (
            float(value["__float__"])
            if value.keys() == {"__float__"}
            else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _with_float32(model: Any, dtype: torch.dtype) -> nn.Module:
    """`model` with every parameter and buffer in float32 whose class asks for that in a model of `dtype`."""
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001  transformers offers no public name for it
    if not plan:
        return cast(nn.Module, model)
    from transformers.core_model_loading import build_glob_alternation

    pattern, *_ = build_glob_alternation(list(plan))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)
    return cast(nn.Module, model)
