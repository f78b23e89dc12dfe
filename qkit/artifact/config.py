"""The `config.json` of a model: read, checked key by key, and written with a `quantization_config`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qkit.artifact.known import apart, both_names
from qkit.artifact.metadata import StoredRule
from qkit.artifact.transformers_experts import STOPPER, stops
from qkit.errors import ArtifactError
from qkit.formats import compressed_groups
from qkit.sources.detect import without_settings
from qkit.storage.read import inside, read_json

CONFIG: Final = "config.json"
LAYERS: Final = 10_000  #: most hidden layers: qkit makes names for each, however few the files hold
SIZE: Final = 1 << 31  #: every other count of a configuration is below this


def _whole(most: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and 0 <= value <= most, f"a whole number from 0 to {most:,}"


def _kind(*kinds: type, name: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, kinds), name


_TABLE, _TEXT = _kind(dict, name="an object"), _kind(str, name="a string")
_TEXTS = (lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of strings")
_NUMBER = (
    lambda value: type(value) is int or (type(value) is float and math.isfinite(value)),
    "a finite number",
)
_SIZES = (  # some models have one for each layer
    lambda value: all(type(one) is int and 0 <= one < SIZE for one in (value if isinstance(value, list) else [value])),
    f"a whole number from 0 to {SIZE - 1:,}",
)

#: By key, at the top and in `text_config`: a test of the value, and its text for messages. Null counts as an absent key.
KEYS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    **dict.fromkeys(("quantization_config", "quantization", "text_config", "rope_parameters", "rope_scaling"), _TABLE),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype", "hidden_act", "hidden_activation"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "query_pre_attn_scalar"), _NUMBER),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), _SIZES),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), _SIZES),
    "num_hidden_layers": _whole(LAYERS),
    "tie_word_embeddings": _kind(bool, name="true or false"),
}


def read_config(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of `folder`; None where there is none.

    Raises:
        ArtifactError: the file is not a JSON object, or is a link out of the folder; or see `check_config`.
    """
    config = read_json(inside(folder, CONFIG))
    if config is not None:
        check_config(config, folder / CONFIG)
    return config


def quantized_config(
    config: Mapping[str, Any] | None,
    rules: Sequence[StoredRule],
    *,
    left_alone: Sequence[str],
    single_experts: bool = False,
) -> dict[str, Any] | None:
    """`config` of a Hugging Face model with the `quantization_config` of its stored rules; None where `config` is None.

    Layers stand in it under their names in the files, which vLLM looks up, and under those of transformers' model.

    Args:
        left_alone: paths of the linear layers that stay float.
        single_experts: whether the files have float experts that are stored one by one.
    """
    if config is None:
        return None
    config = float_config(config)
    if rules:
        groups = [(stored.rule, both_names(stored.paths, config)) for stored in rules]
        floats = {*both_names(left_alone, config), *apart((path for one in rules for path in one.paths), config)}
        config["quantization_config"] = compressed_groups.quantization_config(groups, left_alone=floats)
        if text := stops(config, rules, single_experts=single_experts):
            config["quantization_config"][STOPPER] = text
    return config


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without anything about quantization."""
    return without_settings(config)


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Checks every key of `KEYS` that the configuration has.

    Raises:
        ArtifactError: a value has another type, or is too large; the message names the file and the key.
    """
    inner = config.get("text_config")
    for prefix, table in (("", config), ("text_config.", inner if isinstance(inner, Mapping) else {})):
        for key, (fits, wanted) in KEYS.items():
            value = table.get(key)
            if value is not None and not fits(value):
                raise ArtifactError(f"{file}: {prefix}{key} is {value!r:.200}: want {wanted}")


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Turns a failure of code that computes with the values of `file` into an error that names the file.

    Raises:
        ArtifactError: a key that the model needs is missing, or a value has another type.
    """
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"{file}: {error.args[0]} is missing, which such a model has: fetch it again") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file} describes no model ({type(error).__name__}: {error}): fetch it again") from None
