"""Modules and tensors by dotted name: finding layers, replacing them, and the tensors that a model stores."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace as with_fields
from typing import Any

from torch import Tensor, nn

from qkit.artifact.known import facts, why_not
from qkit.engines.layer import Layer
from qkit.experts import is_router
from qkit.qtensor import dtype_of
from qkit.rules import Kind
from qkit_torchao.layers import patched, sharded
from qkit_torchao.layers.converted import PLAIN
from qkit_torchao.layers.experts import Experts
from qkit_torchao.layers.packed_experts import PackedExperts, buffers_of
from qkit_torchao.layers.prepared import Prepared
from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.layers.scaled_embedding import is_scaled
from qkit_torchao.layers.stacks import Stack, shapes_of, stacks_of
from qkit_torchao.models.fused_head import watch_head
from qkit_torchao.models.wrappers import CONVERTED, Place, heads, is_wrapper, mark, places
from qkit_torchao.torch_private import children
from qkit_torchao.torch_private import parameter as own_parameter

ALIKE = "is it another architecture?"  #: the way out where tensors of a file and of a model differ
SAME = ("FalconLinear",)  #: names of subclasses in transformers that compute what their base computes


def layers(model: nn.Module) -> Iterator[Layer]:
    """Linear and Embedding modules, each once, under their first path; then every other weight that has a row and a column."""
    found = places(model)
    roles = heads(model, found)
    for layer in _layers(model, found):
        place = found[id(layer.module)]
        if layer.kind == "other":
            wrapper = "" if place.part else place.wrapper
            yield with_fields(layer, wrapper=wrapper, unknown=bool(wrapper) and place.unknown)
            continue
        bare = place.bare if place.bare != layer.path else ""
        head = id(layer.module) in roles
        yield with_fields(
            layer,
            bare=bare,
            wrapper=place.wrapper,
            unknown=place.unknown,
            lost=place.lost,
            head=head,
            obstacle=layer.obstacle or place.obstacle,
            dtype=_dtype(layer),
        )


def _dtype(layer: Layer) -> str:
    """The type of the values of a layer on a grid."""
    if layer.stage == "converted":
        return str(layer.module.dtype)
    if layer.stage == "float":
        return ""
    weight = own_parameter(layer.module, layer.stored[0].rpartition(".")[2] if layer.stored else "weight")
    return "" if weight is None else dtype_of(weight)


def _layers(model: nn.Module, found: dict[int, Place]) -> Iterator[Layer]:
    first: dict[int, str] = {}
    seen: dict[int, str] = {}
    for path, module in model.named_modules():
        if _is_layer(module) and not isinstance(module, CONVERTED):
            seen.setdefault(id(module.weight), path)
    known = facts({"model_type": getattr(getattr(model, "config", None), "model_type", None)})
    unread = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for path, module in model.named_modules():  # an embedding owns a shared weight, also where its head comes first
        if isinstance(module, nn.Embedding) and _is_layer(module):
            _owner(path, module, first)
    for path, module in model.named_modules():
        stacks = module.stacks if isinstance(module, Experts) else stacks_of(module)
        if stacks:
            yield _experts(path, module, stacks)
        place = found[id(module)]
        part = f"a part of a {place.wrapper}, which stays float" if place.part else ""
        why = part or why_not(place.bare, known) or _why_not(place.bare, module, read=id(module) in unread)
        if _is_layer(module) and not why:
            yield _layer(path, module, tied=_owner(path, module, first))
        else:
            why = why or f"{type(module).__name__} is no linear layer"
            least = 1 if place.wrapper and not place.part else 2  # a wrapper of a norm is to be seen, too
            yield from _others(path, module, seen, why, least, but={stack.name for stack in stacks})


def _is_layer(module: nn.Module) -> bool:
    """Whether `module` is a layer; some adapters of peft's are subclasses of the layer that they wrap."""
    return isinstance(module, (nn.Linear, nn.Embedding)) and not is_wrapper(module)


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """See `Modules.replace`."""
    swaps = {id(model.get_submodule(path)): new for path, new in modules.items()}
    for path, new in modules.items():
        patched.rebind(new, model.get_submodule(path))
    for parent in list(model.modules()):
        for name, child in list(children(parent).items()):
            if id(child) in swaps:
                children(parent)[name] = swaps[id(child)]
                mark(parent, name, swaps[id(child)])
    for new in modules.values():
        if isinstance(new, Prepared):
            sharded.release(new)
            sharded.install(new)
    _call_children(model)
    watch_head(model)
    return swaps.get(id(model), model)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones under each, but for the quantized weights of converted layers."""
    seen = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (*CONVERTED, PackedExperts))
        for name in (buffers_of(module) if isinstance(module, PackedExperts) else (*PLAIN, "weight"))
    }
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in seen}


def _call_children(model: nn.Module) -> None:
    """Has transformer encoders call layers of ours: in evaluation torch's fused path would read their weights instead.

    Its own switches for that, as of torch 2.13: whether a layer's activation is one that the fused kernel knows, and whether an
    encoder packs masked inputs for it.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_ours(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(map(_has_ours, module.layers)):
            module.use_nested_tensor = False


def _has_ours(parent: nn.Module) -> bool:
    return any(isinstance(child, (Prepared, *CONVERTED)) for child in parent.children())


def _owner(path: str, module: Any, first: dict[int, str]) -> str:
    """Path of an earlier layer with the same weight, or empty; `first` remembers."""
    if isinstance(module, CONVERTED):
        first[id(module)] = path
        return "".join(first.get(id(owner), "") for owner in module.owner)
    owner = first.setdefault(id(module.weight), path)
    return "" if owner == path else owner


def _layer(path: str, module: Any, *, tied: str) -> Layer:
    kind: Kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    shape = (
        (module.num_embeddings, module.embedding_dim)
        if kind == "embedding"
        else (module.out_features, module.in_features)
    )
    if not isinstance(module, CONVERTED):
        sharded.want_known(module)
    if isinstance(module, Prepared):
        adapter = getattr(module, "adapter", "")
        return Layer(
            path,
            kind,
            shape,
            module,
            stage="prepared",
            rule=module.rule,
            mode=module.mode,
            tied=tied,
            adapter=adapter,
            sharded=sharded.is_sharded(module),
        )
    if isinstance(module, CONVERTED):
        how = module.execution
        return Layer(
            path,
            kind,
            shape,
            module,
            stage="converted",
            rule=module.rule,
            native=how.native,
            execution=how.text,
            tied=tied,
            adapter=getattr(module, "adapter", ""),
            mode=getattr(module, "mode", "on"),
        )
    obstacle = ""
    if getattr(module, "max_norm", None) is not None:
        obstacle = "its rows are rescaled at every look-up (max_norm)"
    elif own_parameter(module, "weight") is None:
        obstacle = "its weight is computed from other parameters (weight_norm and the like)"
    elif (cls := sharded.class_of(module)) not in (nn.Linear, nn.Embedding) and not _is_known(cls, module):
        obstacle = f"{cls.__name__} is a subclass of {kind} that qkit does not know"
    obstacle = obstacle or patched.why_not(module)
    return Layer(path, kind, shape, module, tied=tied, obstacle=obstacle, sharded=sharded.is_sharded(module))


def _experts(path: str, module: Any, stacks: tuple[Stack, ...]) -> Layer:
    projections = shapes_of(stacks)
    count, _, inputs = projections["up_proj"]
    shape = (count, sum(outputs * n for _, outputs, n in projections.values()) // inputs, inputs)
    stored = tuple(f"{path}.{stack.name}" if path else stack.name for stack in stacks)
    known: dict[str, Any] = {
        "projections": projections,
        "stored": stored,
        "adapter": getattr(module, "adapter", ""),
        "interleaved": stacks[0].interleaved,
    }
    if isinstance(module, FakeExperts):
        return Layer(
            path,
            "experts",
            shape,
            module,
            stage="prepared",
            rule=module.rule,
            mode=module.mode,
            sharded=_is_sharded(module),
            **known,
        )
    if isinstance(module, PackedExperts):
        how = module.execution
        return Layer(
            path,
            "experts",
            shape,
            module,
            stage="converted",
            rule=module.rule,
            native=how.native,
            execution=how.text,
            **known,
        )
    return Layer(path, "experts", shape, module, sharded=_is_sharded(module), **known)


def _is_known(cls: type, module: nn.Module) -> bool:
    return is_scaled(module) or cls.__name__ in SAME


def _is_sharded(module: nn.Module) -> bool:
    return sharded.is_managed(module) or any(map(sharded.is_shard, module.parameters(recurse=False)))


def _others(
    path: str, module: nn.Module, seen: dict[int, str], why: str, least: int, *, but: Collection[str] = ()
) -> Iterator[Layer]:
    """Weights of a module that no rule covers, of `least` axes or more. `seen` has the paths of those in other modules, too."""
    for name, parameter in module.named_parameters(path, recurse=False):
        if parameter.dim() >= least and parameter.numel() and name.rpartition(".")[2] not in but:
            owner = seen.setdefault(id(parameter), name)
            tied = "" if owner in (name, path) else owner
            yield Layer(name, "other", tuple(parameter.shape), module, tied=tied, obstacle=why)


def _why_not(path: str, module: nn.Module, *, read: bool) -> str:
    """Why a module takes no codes whatever its weight; empty where it may."""
    if is_router(path):
        return "a router"
    if isinstance(module, Experts) or stacks_of(module):
        return "biases of experts"
    if read or isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights itself"
    if isinstance(module, nn.Embedding) and "Positional" in type(module).__name__:
        return f"{type(module).__name__} embeds positions in its own way"
    return ""
