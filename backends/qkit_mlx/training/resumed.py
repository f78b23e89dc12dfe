"""Adapters that a command of mlx-lm or mlx-lm-lora goes on from: whether they are of the model that it loads."""

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qkit.errors import RunError

CONFIG = "adapter_config.json"  #: beside the adapters; both tools write it or read it
KEY = "qkit_base"  #: its key for the digest of the base


def digest(model: nn.Module) -> str:
    """A digest of the names, types and numbers of a float model."""
    found = blake2b(digest_size=16)
    parameters: Any = tree_flatten(model.parameters())
    for name, array in sorted(parameters):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return found.hexdigest()


def note_base(folder: Path, base: str) -> None:
    """Writes the digest of the base into the settings of the adapters in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**_settings(folder), KEY: base}, indent=4), encoding="utf-8")


def check_base(file: str, base: str, *, digest_of: Callable[[str], str]) -> None:
    """Refuses adapters that were trained on another base, although the shapes may be the same.

    Args:
        digest_of: the digest of the model in a directory; for settings of mlx-lm's own, which name their model alone.

    Raises:
        RunError: the settings beside the adapters have the digest of another base, or name a directory with another.
    """
    settings = _settings(Path(file).parent)
    noted, named = settings.get(KEY), settings.get("model")
    if noted is None and isinstance(named, str) and Path(named).is_dir():
        noted = digest_of(named)
    if noted not in (None, base):
        raise RunError(
            f"--resume-adapter-file {file} is for another base: it was trained on weights with digest {noted}, and the model's "
            f"is {base}: take the base that it was trained on"
        )


def check_shapes(file: str, model: nn.Module) -> None:
    """Refuses a file of adapters that `model`, with its adapters on, would not take: MLX itself leaves such out without a word.

    Raises:
        RunError: the file cannot be read, or has a tensor that the model has not, or in another shape.
    """
    try:
        found: Any = mx.load(file)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"--resume-adapter-file {file}: {error}") from None
    known: Any = dict(tree_flatten(model.parameters()))
    for name, array in found.items():
        if name not in known or known[name].shape != array.shape:
            what = list(known[name].shape) if name in known else "missing"
            raise RunError(
                f"--resume-adapter-file {file} is for another base: its {name} is {list(array.shape)}, and the model's is {what}"
                ": take the base and the options that it was trained with"
            )


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / CONFIG}: {error}") from None
    return found if isinstance(found, Mapping) else {}
