"""Layers that mlx-lm spreads over several modules: blocks of experts, and the two halves of `kv_b_proj`."""

from collections.abc import Mapping
from math import prod
from typing import Any

import mlx.nn as nn

from qkit.engines.layer import Layer, Stage
from qkit.experts import INTERLEAVED, module_name, types_of
from qkit.rules import Kind
from qkit_mlx.layers import experts, latent
from qkit_mlx.layers.adapted_latent import AdaptedHalf
from qkit_mlx.layers.converted_experts import CONVERTED_STACKS
from qkit_mlx.layers.prepared import mode_of
from qkit_mlx.layers.stacks import FakeSwitchLinear
from qkit_mlx.models.names import config_of, outward

FAKE = (FakeSwitchLinear, latent.FakeHeads)
CONVERTED = (*CONVERTED_STACKS, latent.PackedHeads)


def parts_of(module: Any) -> list[Any]:
    """The modules that hold the weights of the layer that `module` or its parts are; empty for any other module."""
    if blocks := experts.parts(module):
        return list(blocks.values())
    halves = latent.halves_of(module)
    return [halves.keys, halves.values] if halves else []


def modules_of(module: Any) -> list[Any]:
    """The modules that a layer's `module` stands for: itself, or the parts of it."""
    if isinstance(module, latent.Halves):
        return [module.keys, module.values]
    return list(experts.parts(module).values()) or [module]


def layer_of(path: str, module: Any, model: Any) -> Layer | None:
    """The layer whose parts are in `module`, at `path` in `model`; None for any other module."""
    place = _place(path, module, model)
    if place is None:
        return None
    found, prefix = parts_of(module), f"{path}." if path else ""
    if stacks := experts.parts(module):
        shapes = {name: _shape(stack) for name, stack in stacks.items()}
        count, _, inputs = shapes["up_proj"]
        shape: tuple[int, ...] = (count, sum(map(prod, shapes.values())) // (count * inputs), inputs)
        names = {id(part): name for name, part in module.items()}
        stored = tuple(f"{prefix}{names[id(stack)]}.weight" for stack in stacks.values())
        known: dict[str, Any] = {"projections": shapes, "stored": stored}
        known["adapter"] = next((part.adapter for part in found if hasattr(part, "adapter")), "")
        known["interleaved"] = bool(types_of(config_of(model)) & set(INTERLEAVED))
        return _layer(place, "experts", shape, module, found, **known)
    halves = latent.halves_of(module)
    if isinstance(found[0], latent.PackedHeads):
        shape = (sum(half.heads * half.rows for half in found), found[0].inputs)
    else:
        shape = tuple(latent.weight_of(halves).shape)
    return _layer(place, "linear", shape, halves, found, adapter=getattr(found[1], "adapter", ""))


def places(present: Mapping[str, nn.Module], model: Any) -> dict[str, nn.Module]:
    """By the path of each such layer, the module of `present` that has its parts."""
    found = {_place(path, module, model): module for path, module in present.items()}
    return {place: module for place, module in found.items() if place is not None}


def replacements(module: Any, instead: Any) -> dict[int, nn.Module]:
    """The modules to put in place of others, whose identities are given, to replace the layer in `module` by `instead`."""
    if isinstance(instead, latent.Halves):
        return {id(module[latent.KEYS]): instead.keys, id(module[latent.VALUES]): instead.values}
    return {id(module): instead}


def blocks_of(present: Mapping[str, nn.Module], model: Any) -> dict[str, Layer]:
    """The blocks of experts among the modules `present`, by their paths in transformers."""
    found = (layer_of(path, module, model) for path, module in present.items() if experts.parts(module))
    return {layer.path: layer for layer in found if layer}


def join(path: str, key: object) -> str:
    """The path of the part `key` of the module at `path`, which is empty for the model itself."""
    return f"{path}.{key}" if path else str(key)


def _place(path: str, module: Any, model: Any) -> str | None:
    """The path in transformers of the layer whose parts are in `module`; None for any other module."""
    if experts.parts(module):
        return module_name(outward(join(path.rpartition(".")[0], "experts"), model), config_of(model))
    return outward(join(path, latent.NAME), model) if latent.halves_of(module) else None


def _layer(path: str, kind: Kind, shape: tuple[int, ...], module: Any, found: list[Any], **more: Any) -> Layer:
    first = found[0]
    stage: Stage = "prepared" if isinstance(first, FAKE) else "converted" if isinstance(first, CONVERTED) else "float"
    rule = None if stage == "float" else first.rule
    gated = stage == "prepared" or isinstance(first, AdaptedHalf)
    mode = mode_of(first) if gated else "on"
    if stage == "converted":
        slow = next((part.execution for part in found if not part.execution.native), first.execution)
        more |= {"native": slow.native, "execution": slow.text}
    return Layer(path, kind, shape, module, stage, rule, mode, **more)


def _shape(stack: Any) -> tuple[int, int, int]:
    return (
        (stack.num_experts, stack.output_dims, stack.input_dims) if isinstance(stack, CONVERTED) else stack.weight.shape
    )
