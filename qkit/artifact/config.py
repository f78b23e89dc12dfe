"""The keys of a `config.json` that qkit computes with: each of the type and size that it may have."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qkit.errors import ArtifactError

LAYERS: Final = 10_000  #: most hidden layers: names are made for each, whatever the files hold
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

#: By key, at the top and in `text_config`: a test, and the words for it. A null is as good as no key.
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


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Looks at every key of `KEYS` that is there.

    Raises:
        ArtifactError: a value is of another type, or too large; the message names the file and the key.
    """
    inner = config.get("text_config")
    for prefix, table in (("", config), ("text_config.", inner if isinstance(inner, Mapping) else {})):
        for key, (fits, words) in KEYS.items():
            value = table.get(key)
            if value is not None and not fits(value):
                raise ArtifactError(f"{file}: {prefix}{key} is {value!r:.200}: want {words}")


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Names `file` where work on its values alone fails: a key that the model needs is missing, or of another type.

    Raises:
        ArtifactError: it does.
    """
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"{file}: {error.args[0]} is missing, which such a model has: fetch it again") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file} describes no model ({type(error).__name__}: {error}): fetch it again") from None
