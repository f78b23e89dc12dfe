"""Facts about the names of a family's tensors, taken from transformers' own classes; `qkit/artifact/families.json` has them."""

from pathlib import Path
from typing import Any

import numpy as np
import openings
from torch import nn

import qkit
from qkit.artifact.config import read_config
from qkit.artifact.families import layer_of
from qkit.artifact.known import pattern_of
from qkit.engines.layer import is_head_path
from qkit.errors import ArtifactError
from qkit.experts import Member
from qkit.storage.read import read_folder


def facts(model: Any, folder: Path) -> dict[str, Any]:
    """The facts on `model` that the plan needs beyond the names and shapes of its tensors. Its checkpoint is in `folder`.

    `prefixes`: beginnings of paths in the files, and in the model. `apart`: patterns of layers of the model whose weights have no
    tensor of their own in the files. `kinds`: what layers of the files are whose names suggest something else. `read`: patterns
    of layers of the model whose weights other modules read, or change. `tied`: whether embedding and output head are one weight
    where the configuration is silent. `heads`: patterns of layers of output heads whose names do not say so. `fp32`: parts of
    names of tensors that stay float32 in models of half precision. `base`: the name of the base model in `model`.
    """
    engine = qkit.backend("torchao")
    slots = {name: one.slot for name, one in read_folder(folder)[0].items()}
    prefixes: dict[str, str] = {}
    mine = set()
    for name, slot in slots.items():
        path, _, last = name.rpartition(".")
        if last != "weight":
            continue
        try:
            _, places = engine.translate(model, {}, {path: slot.shape})
        except ArtifactError:
            continue
        mine.add(places[path])
        if places[path] != path:
            before, after = _without_common_end(path, places[path])
            prefixes[pattern_of(before)] = pattern_of(after)
    kinds = _kinds(engine, model, folder, slots)
    layers = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    apart = sorted({pattern_of(path) for path in layers - mine})
    read = sorted({pattern_of(path) for path in _read_by_their_parents(model)})
    base = type(model).base_model_prefix
    known = {
        "prefixes": prefixes,
        "base": base if base and hasattr(model, base) else "",
        "apart": apart,
        "kinds": kinds,
        "read": read,
        "heads": sorted(
            {
                pattern_of(layer.path)
                for layer in engine.layers(model)
                if layer.head and layer.kind == "linear" and not is_head_path(layer.path)
            }
        ),
        "fp32": sorted(model._keep_in_fp32_modules_strict or ()),  # noqa: SLF001  transformers has no public name
        "tied": bool(_default(model, "tie_word_embeddings")),
    }
    return {key: value for key, value in known.items() if value}


def _kinds(engine: Any, model: Any, folder: Path, slots: dict[str, Any]) -> dict[str, str]:
    """By pattern, what a layer of the files is where its name and shape suggest something else."""
    config = {**(read_config(folder) or {}), "model_type": ""}
    layers = {layer.path: layer for layer in engine.layers(model)}
    found = {}
    for name, slot in slots.items():
        path, _, last = name.rpartition(".")
        suggested = layer_of(slot, config)
        if last != "weight" or len(slot.shape) != 2 or isinstance(suggested, Member):
            continue
        try:
            place = engine.translate(model, {}, {path: slot.shape})[1][path]
            real = layers.get(place)
            real = real or layers.get(f"{place}.weight")
            reason = (real.obstacle if real else "") or "no linear layer or embedding of transformers' model"
        except ArtifactError:
            real, reason = None, "transformers splits, joins or permutes it as it loads it"
        kind = real.kind if real and real.kind != "other" and not real.obstacle else reason
        if isinstance(suggested, str):
            if kind in ("linear", "embedding") and suggested != "a router":
                found[pattern_of(path)] = kind
        elif suggested.kind != kind:
            found[pattern_of(path)] = kind
    return found


def _read_by_their_parents(model: Any) -> set[str]:
    """Layers that a forward does not call although it calls the module that has them, or whose weights it changes."""
    modules = dict(model.named_modules())
    called, hooks = set(), []
    for path, module in modules.items():
        hooks.append(module.register_forward_hook(lambda *_, path=path: called.add(path)))
    layers = {path for path, module in modules.items() if isinstance(module, (nn.Linear, nn.Embedding))}
    before = {path: modules[path].weight._version for path in layers}  # noqa: SLF001  torch has no public name
    openings.run(model)
    for hook in hooks:
        hook.remove()
    changed = {path for path in layers if modules[path].weight._version != before[path]}  # noqa: SLF001  as above
    unused = {
        path for path in layers - called if path.rpartition(".")[0] in called - {""} and not _is_twin(path, modules)
    }
    return changed | {path for path in unused if _matters(model, modules[path])}


def _is_twin(path: str, modules: dict[str, Any]) -> bool:
    """Whether another module has the same weight, such as the embedding of an encoder."""
    weight = modules[path].weight
    return any(getattr(one, "weight", None) is weight for other, one in modules.items() if other != path)


def _matters(model: Any, module: Any) -> bool:
    """Whether the output of `model` depends on the weight of `module`."""
    before = openings.run(model)
    kept = module.weight.data.clone()
    module.weight.data += 1.0
    after = openings.run(model)
    module.weight.data = kept
    return not np.array_equal(before, after, equal_nan=True)


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    a, b = one.split("."), other.split(".")
    while len(a) > 1 and len(b) > 0 and a[-1] == b[-1]:
        a.pop(), b.pop()
    return ".".join(a), ".".join(b)


def _default(model: Any, key: str) -> Any:
    default = type(model).config_class()
    return getattr(default, key, getattr(default.get_text_config(), key, None))
