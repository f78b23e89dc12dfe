"""Modules and arrays of a model by dotted name: finds and replaces layers, reads and fills stored arrays."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace as with_fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit.artifact.known import stays_float32
from qkit.engines.layer import Layer, Mode, is_head_path
from qkit.errors import ArtifactError, BackendError
from qkit.experts import is_router
from qkit.qtensor import dtype_of
from qkit.reference.merged import Update
from qkit.reference.packing import WORD_BITS
from qkit.rules import Kind
from qkit_mlx.layers import latent
from qkit_mlx.layers.adapted import NAMES
from qkit_mlx.layers.converted import CONVERTED, STORED, PlainEmbedding
from qkit_mlx.layers.converted_experts import CONVERTED_STACKS
from qkit_mlx.layers.prepared import FakeEmbedding, FakeLinear, mode_of, quantizes
from qkit_mlx.models import groups, names
from qkit_mlx.models.groups import join
from qkit_mlx.models.wrappers import Place, mark, places, unwrapped

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding, PlainEmbedding)


def layers(model: nn.Module) -> list[Layer]:
    """Every layer, and every other weight of two or more dimensions, in the order of the model."""
    modules = list(_modules(model))
    spots = places(modules)
    found: list[Layer] = []
    parts: set[int] = set()
    for path, module in modules:
        if (group := groups.layer_of(path, module, model)) is not None:
            found.append(group)
            parts.update(id(part) for part in groups.parts_of(module))
        elif id(module) not in parts:
            found.extend(_listed(path, module, model))
    return [_placed(layer, spots.get(id(layer.module)), model) for layer in found]


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, Update]]:
    """See `qkit.engines.elsewhere.Restores.unwrap`; what mlx-lm has put around layers."""
    instead, updates = unwrapped(_modules(model))
    outward = {names.outward(path, model): module for path, module in instead.items()}
    return replace(model, outward), {names.outward(path, model): update for path, update in updates.items()}


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with the module at each path replaced, at every place of that module; in place, unless it is the root.

    Raises:
        BackendError: there is no module at a path.
    """
    own = dict(_modules(model))
    grouped = groups.places(own, model)
    present = {names.outward(path, model): module for path, module in own.items()}
    instead: dict[int, nn.Module] = {}
    for path, module in modules.items():
        if path not in present and path not in grouped:
            raise BackendError(f"the model has no module {path!r}: it has {', '.join(list(present)[:8])}")
        if path in grouped:
            instead |= groups.replacements(grouped[path], module)
        else:
            instead[id(present[path])] = module
    for module in list(present.values()):
        _replace_in(module, instead, module)
    return modules.get("", model)


#: Buffers that old files hold under every layer, and that are computed.
COMPUTED = ("inv_freq", "position_ids")


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """Every stored array by name, each once, except the quantized weights of converted layers.

    The names are those of transformers where mlx-lm splits a tensor; see `names`.
    """
    return names.joined({name: container[key] for name, container, key in _slots(model)}, model)


def fill(model: nn.Module, arrays: Mapping[str, mx.array], *, without: Collection[str] = (), within: str = "") -> None:
    """Writes `arrays` to the places of `tensors(model)`, except the names in `without`; casts half precision up to float32.

    If the names differ, the model's own `sanitize` translates them first. Only names that begin with `within` are written. In a
    model whose configuration says half precision, float32 is cast, or stays, as in transformers.

    Raises:
        ArtifactError: a name, a shape or a type does not fit, or a name is missing. Nothing was written then.
    """
    slots = {name: (container, key) for name, container, key in _slots(model)}
    stored = {name: container[key] for name, (container, key) in slots.items()}
    missing = names.split_names(without, stored, model)
    arrays = names.translated(arrays, stored, model, groups.blocks_of(dict(_modules(model)), model), without)
    slots = {
        name: (container, key) for name, container, key in _slots(model) if name not in missing
    }  # `sanitize` drops heads
    arrays = {name: array for name, array in arrays.items() if name in slots or name.rpartition(".")[2] not in COMPUTED}
    for name in [*slots, *arrays]:
        if name not in arrays:
            raise ArtifactError(f"{name} is missing: the model has it, and the artifact does not")
        if name not in slots:
            raise ArtifactError(
                f"{name} is in the artifact, and the model has no such tensor: is it another architecture?"
            )
    for name, (container, key) in slots.items():
        want, shape = tuple(container[key].shape), tuple(arrays[name].shape)
        if want != shape:
            raise ArtifactError(f"{name} has shape {shape}, and the model wants {want}: is it another architecture?")
        if not _fits(arrays[name].dtype, container[key].dtype, model):
            raise ArtifactError(
                f"{name} is {arrays[name].dtype} in the file and {container[key].dtype} in the model: cast the model"
            )
    for name, (container, key) in slots.items():
        if name.startswith(within):
            stays = arrays[name].dtype == mx.float32 and stays_float32(name, getattr(model, "qkit_config", None))
            container[key] = arrays[name] if stays else arrays[name].astype(container[key].dtype)


def _fits(dtype: mx.Dtype, want: mx.Dtype, model: nn.Module) -> bool:
    config = getattr(model, "qkit_config", None) or {}
    said = str(config.get("dtype") or config.get("torch_dtype"))
    cast = dtype == mx.float32 and said in ("bfloat16", "float16") and want == getattr(mx, said)
    return dtype == want or cast or (want == mx.float32 and dtype in (mx.bfloat16, mx.float16))


# Walking. An MLX module is a dict of arrays, modules, lists and dicts; the same module may be registered twice.


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items() if isinstance(container, dict) else enumerate(container))


def _modules(container: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every module under `container`, itself included, once, at its first path."""
    seen = set() if seen is None else seen
    if isinstance(container, nn.Module):
        if id(container) in seen:
            return
        seen.add(id(container))
        yield path, container
    for key, value in _items(container):
        if isinstance(value, (dict, list)):
            yield from _modules(value, join(path, key), seen)


def _replace_in(container: Any, instead: Mapping[int, nn.Module], parent: nn.Module, path: str = "") -> None:
    """Replaces the module at `path` in `container`, or in `parent`, where `container` is `parent` itself."""
    for key, value in list(_items(container)):
        if id(value) in instead:
            container[key] = instead[id(value)]
            mark(parent, join(path, key), container[key])
        elif isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
            _replace_in(value, instead, parent, join(path, key))


def _slots(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    for path, module in _modules(model):
        if isinstance(module, CONVERTED_STACKS):
            yield from ((join(path, key), module, key) for key in ("bias", *NAMES) if key in module)
        elif not isinstance(module, (*CONVERTED, latent.PackedHeads)):
            yield from _arrays(module, path)
        else:
            yield from ((join(path, key), module, key) for key in STORED if key in module)


def _arrays(container: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, container and key of each array in a module, also in its lists and dicts, but not in its submodules."""
    for key, value in _items(container):
        private = isinstance(container, nn.Module) and key.startswith("_")  # MLX does not store private arrays either
        if private:
            continue
        if isinstance(value, mx.array):
            yield join(path, key), container, key
        elif isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
            yield from _arrays(value, join(path, key))


# Layers


def _placed(layer: Layer, place: Place | None, model: Any) -> Layer:
    layer = with_fields(layer, dtype=_dtype(layer))
    if layer.kind not in ("linear", "embedding") or place is None:
        return layer
    bare = names.outward(place.bare, model)
    of_mlx_lm = type(model).__module__.startswith("mlx_lm.")  # whose heads have these names
    head = of_mlx_lm and layer.kind == "linear" and is_head_path(bare)
    return with_fields(
        layer,
        bare=bare if bare != layer.path else "",
        wrapper=place.wrapper,
        unknown=place.unknown,
        lost=place.lost,
        head=head,
    )


def _dtype(layer: Layer) -> str:
    """The type of the values of a layer on a grid."""
    if layer.stage == "float" or layer.kind == "other":
        return ""
    first = groups.modules_of(layer.module)[0]
    return str(first.dtype) if layer.stage == "converted" else dtype_of(first.weight)


def _listed(own: str, module: Any, model: Any) -> Iterator[Layer]:
    """`module` as a layer, if it is one, and every other weight of its own."""
    path = names.outward(own, model)
    layer = _layer(path, module)
    if layer and layer.kind == "linear" and layer.stage == "float" and is_router(path):
        yield Layer(join(path, "weight"), "other", layer.shape, module, obstacle="a router")
    elif layer:
        yield layer
    if isinstance(module, (*CONVERTED, FakeLinear, FakeEmbedding)):
        return
    known = ("weight", "bias", "scales", "biases") if layer else ("bias", "scales", "biases")
    for name, container, key in _arrays(module, own):
        array = container[key]
        is_weight = mx.issubdtype(array.dtype, mx.floating) or _is_packed(array, module)
        if is_weight and array.ndim > 1 and not (container is module and key in known):
            yield _other(names.outward(name, model), module, array)


def _layer(path: str, module: Any) -> Layer | None:
    kind: Kind = "embedding" if isinstance(module, EMBEDDINGS) else "linear"
    if isinstance(module, CONVERTED):
        shape = (module["weight"].shape[0], module.inputs)
        execution, adapter = module.execution, getattr(module, "adapter", "")
        mode: Mode = "on" if not adapter or quantizes(module) else "off"
        how: dict[str, Any] = {
            "native": execution.native,
            "execution": execution.text,
            "adapter": adapter,
            "mode": mode,
        }
        return Layer(path, kind, shape, module, "converted", module.rule, **how)
    if isinstance(module, (FakeLinear, FakeEmbedding)):
        adapter, mode = getattr(module, "adapter", ""), mode_of(module)
        return Layer(path, kind, tuple(module.weight.shape), module, "prepared", module.rule, mode, adapter=adapter)
    if type(module) in (nn.Linear, nn.Embedding):
        return Layer(path, kind, tuple(module.weight.shape), module)
    name = type(module).__name__
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return Layer(
            path, kind, _unpacked(module["weight"], module), module, obstacle=f"quantized by MLX already ({name})"
        )
    if isinstance(module, nn.Linear):
        return Layer(path, kind, tuple(module.weight.shape), module, obstacle=f"a subclass of Linear ({name})")
    if isinstance(module, nn.Embedding):
        return Layer(path, kind, tuple(module.weight.shape), module, obstacle=f"a subclass of Embedding ({name})")
    return None


def _other(path: str, module: Any, array: mx.array) -> Layer:
    """A weight that no rule can match: of a convolution, of stacked experts, of a module of the user's."""
    name = type(module).__name__
    if _is_packed(array, module):
        return Layer(path, "other", _unpacked(array, module), module, obstacle=f"quantized by MLX already ({name})")
    obstacle = f"of a {name}, which is neither a linear layer nor an embedding"
    return Layer(path, "other", tuple(array.shape), module, obstacle=obstacle)


def _is_packed(array: mx.array, module: Any) -> bool:
    """Whether `array` is a weight in MLX's packed words."""
    return array.dtype == mx.uint32 and "scales" in module


def _unpacked(array: mx.array, module: Any) -> tuple[int, ...]:
    """Shape of the weight whose packed words are `array`."""
    return (*array.shape[:-1], array.shape[-1] * WORD_BITS // module.bits)
