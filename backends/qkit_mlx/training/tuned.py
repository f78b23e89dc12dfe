"""Checkpoints of training by mlx-lm-lora, which itself saves weights alone: weights, moments, and the states of both drawings."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from qkit.engines.protocol import Trains
from qkit.errors import ArtifactError

PATTERN = "checkpoint-*.safetensors"
KEPT = 2  #: checkpoints that stay
GAUSS = ("rng.gauss", "rng.cached")


def file_of(place: Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return place / f"checkpoint-{step:08d}.safetensors"


def newest(place: Path) -> int:
    """The step of the last checkpoint in `place`; 0 where there is none."""
    files = sorted(place.glob(PATTERN))
    return int(files[-1].stem.removeprefix("checkpoint-")) if files else 0


def write(engine: Trains, model: nn.Module, optimizer: Any, place: Path, step: int) -> None:
    """Writes a checkpoint, complete or absent, and removes all but the last two."""
    found = {f"weights.{name}": mx.array(x) for name, x in engine.tensors(model).items()}
    found |= {f"optimizer.{name}": x for name, x in _flat(optimizer.state)}
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found |= {"rng.numpy": mx.array(np.asarray(keys)), "rng.position": mx.array(int(position))}
    found |= {"rng.gauss": mx.array(int(has_gauss)), "rng.cached": mx.array(float(cached))}
    found["rng.mlx"] = _random_state()[0]
    aside = place / "writing.safetensors"
    mx.save_safetensors(str(aside), found)
    os.replace(aside, file_of(place, step))
    for old in sorted(place.glob(PATTERN))[:-KEPT]:
        old.unlink()


def restore(engine: Trains, model: nn.Module, optimizer: Any, file: Path) -> None:
    """Puts `model`, its optimizer and the random numbers into the state of a checkpoint.

    Raises:
        ArtifactError: the file is damaged, or of another model.
    """
    try:
        found: Any = mx.load(str(file))
    except RuntimeError as error:
        raise ArtifactError(f"{file}: {error}: remove {file.parent} to begin anew") from None
    weights = {name.removeprefix("weights."): np.array(x) for name, x in found.items() if name.startswith("weights.")}
    engine.fill(model, weights)
    optimizer.init(model.trainable_parameters())
    moments = {name.removeprefix("optimizer."): x for name, x in found.items() if name.startswith("optimizer.")}
    if moments.keys() != dict(_flat(optimizer.state)).keys():
        raise ArtifactError(f"{file} is of another model: remove {file.parent} to begin anew")
    optimizer.state = tree_unflatten([*moments.items()])
    gauss, cached = (found[name].item() for name in GAUSS)
    np.random.set_state(("MT19937", np.array(found["rng.numpy"]), found["rng.position"].item(), gauss, cached))
    high, low = (int(half) for half in np.array(found["rng.mlx"]))
    mx.random.seed(high << 32 | low)  # the state is the two halves of a seed, and MLX cannot set it otherwise


def _random_state() -> Any:
    return mx.random.state


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    arrays: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return arrays
