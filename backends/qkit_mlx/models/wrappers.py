"""Modules of mlx-lm around layers, LoRA and DoRA, and the marks of layers that are on a grid. Imports no mlx-lm."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.errors import StageError
from qkit.reference.merged import Update
from qkit_mlx.layers.converted import CONVERTED
from qkit_mlx.layers.prepared import FakeEmbedding, FakeLinear

OURS = (*CONVERTED, FakeLinear, FakeEmbedding)
PLAIN = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
INNER = ("linear", "embedding")  #: names of the layer in a wrapper
MARK = "qkit_grids"  #: attribute of a module: the paths below it of those layers that are on a grid


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a module in a model: see the fields of `Layer` with these names."""

    bare: str
    wrapper: str = ""
    unknown: bool = False
    lost: bool = False


def places(modules: Iterable[tuple[str, Any]]) -> dict[int, Place]:
    """The place of each module, by its id; `modules` are those of a model by path, parents first."""
    found: dict[int, Place] = {}
    wrappers: dict[str, Any] = {}
    marked: set[str] = set()
    for path, module in modules:
        if not isinstance(module, OURS) and (_adapts(module) or (path in marked and type(module) not in PLAIN)):
            wrappers.setdefault(path, module)
        around = [one for above in _above(path) if (one := wrappers.get(above)) is not None]
        name = type(around[0]).__name__ if around else ""
        lost = path in marked and type(module) in PLAIN
        found[id(module)] = Place(_bare(path, wrappers), name, not all(map(is_wrapper, around)), lost)
        marked.update(f"{path}.{below}" if path else below for below in getattr(module, MARK, ()))
    return found


def mark(parent: nn.Module, path: str, module: Any) -> None:
    """Notes on `parent` whether the layer at `path` below it is on a grid."""
    paths = set(getattr(parent, MARK, ()))
    (paths.add if isinstance(module, OURS) else paths.discard)(path)
    setattr(parent, MARK, frozenset(paths))


def is_wrapper(module: Any) -> bool:
    """Whether `module` is LoRA or DoRA of mlx-lm around a layer."""
    return "lora_a" in module and "lora_b" in module and hasattr(module, "fuse") and _inner(module) is not None


def unwrapped(modules: Iterable[tuple[str, Any]]) -> tuple[dict[str, nn.Module], dict[str, Update]]:
    """The layer to put at the path of each wrapper, and the updates of converted layers, which are still to be merged.

    mlx-lm itself merges adapters on float and prepared layers, in the latter with their values on the grid under DoRA.

    Raises:
        StageError: the layer is a converted embedding.
    """
    instead: dict[str, nn.Module] = {}
    updates: dict[str, Update] = {}
    for path, module in modules:
        if isinstance(module, OURS) or not is_wrapper(module):
            continue
        inner: Any = _inner(module)
        if isinstance(inner, CONVERTED):
            if "linear" not in module:
                raise StageError(
                    f"cannot merge: {path} is a converted embedding, and adapters are for linear layers: remove the one on it"
                )
            updates[path] = _update(module)
        elif isinstance(inner, OURS):
            inner["weight"] = module.fuse().weight.astype(inner["weight"].dtype)
        else:
            inner = module.fuse()
        instead[path] = inner
    return instead, updates


def _update(module: Any) -> Update:
    a, b = (np.array(module[name].astype(mx.float32)).T.copy() for name in ("lora_a", "lora_b"))
    magnitude = np.array(module["m"].astype(mx.float32)) if "m" in module else None
    return Update(a, b, float(module.scale), magnitude)


def _inner(module: Any) -> Any:
    return next((module[name] for name in INNER if isinstance(module.get(name), nn.Module)), None)


def _adapts(module: Any) -> bool:
    """Whether `module` has factors of an adapter, by their usual names."""
    return any(str(key).lower().startswith("lora_") for key in module)


def _above(path: str) -> Iterable[str]:
    """`path`, and the paths of all that it is in, the outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _bare(path: str, wrappers: dict[str, Any]) -> str:
    parts = path.split(".") if path else []
    kept = [part for i, part in enumerate(parts) if not (part in INNER and ".".join(parts[:i]) in wrappers)]
    return ".".join(kept)
