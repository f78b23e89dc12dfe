"""Modules of other libraries around layers: peft's adapters and copies, compiled and parallel models. Nothing imports them."""

import re
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qkit.engines.layer import is_head_path
from qkit.errors import StageError
from qkit.reference.merged import Update
from qkit_torchao.layers.converted import PackedEmbedding, PackedLinear
from qkit_torchao.layers.prepared import Prepared
from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.torch_private import children

CONVERTED = (PackedLinear, PackedEmbedding)
MARK = "qkit_grids"  #: attribute of a module: the names of those children that are on a grid

#: Methods of peft 0.21 whose layers multiply with the weight of the layer that they wrap, instead of calling it.
READERS = ("frod", "glora", "hra", "shira", "supertuning")
REPLACERS = ("ln_tuning", "trainable_tokens")  #: those whose layers leave it out, for norms and embeddings in float

HELD = ("base_layer", "token_adapter")  #: attributes of peft's wrappers: the module inside
PROMPTS = "prompt_encoder"  #: attribute of peft's model that has learned prompts in place of adapters

#: The parts of a path that wrappers put in: peft's, torch.compile's, FSDP's, and those of models in models, at the beginning.
OUTER = re.compile(r"^((module|_orig_mod|_fsdp_wrapped_module|base_model\.model|pretrained_model)(\.|$))+")
INNER = re.compile(
    r"\.(base_layer|token_adapter|original_module|modules_to_save\.[^.]+|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a module in a model.

    Attributes:
        bare: its path without the parts of wrappers.
        wrapper: the class of the wrapper that it is in; empty where there is none.
        unknown: whether qkit does not know that class, or cannot see past it.
        part: whether it is a part of the wrapper's own, such as a factor of LoRA, and not the layer inside.
        lost: whether it took the place of a layer on a grid.
        obstacle: why it has to stay in float where it is; empty where it has not.
    """

    bare: str
    wrapper: str = ""
    unknown: bool = False
    part: bool = False
    lost: bool = False
    obstacle: str = ""


def places(model: nn.Module) -> dict[int, Place]:
    """The place of each module of `model`, by its id, in the order of `named_modules`."""
    found: dict[int, Place] = {}
    marked: set[str] = set()
    inside: dict[str, tuple[Place, nn.Module]] = {}
    prompted = ""
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        above, holder = inside.get(parent, (Place(""), model))
        wrapper, unknown = above.wrapper, above.unknown
        if _has_prompts(module):
            wrapper, prompted = _name(module), f"{path}.base_model." if path else "base_model."
        part = above.part or (path != "" and _is_part(holder, name))
        ours = isinstance(module, (Prepared, *CONVERTED))
        lost = path in marked and type(module) in (nn.Linear, nn.Embedding)
        if not ours and not part:
            if is_wrapper(module):
                wrapper, unknown = _name(module), unknown or _is_of(module, READERS)
            elif _adapts(module) or (path in marked and not lost):
                wrapper, unknown = _name(module), True
        marked.update(f"{path}.{child}" if path else child for child in getattr(module, MARK, ()))
        bare = bare_path(path.removeprefix(prompted)) if prompted else bare_path(path)
        obstacle = f"{wrapper} leaves it out" if _is_of(holder, REPLACERS) and not part else ""
        found[id(module)] = Place(bare, wrapper, unknown or bool(obstacle and ours), part, lost, obstacle)
        inside[path] = found[id(module)], module
    return found


def bare_path(path: str) -> str:
    """`path` without the parts that wrappers of other libraries put in."""
    return INNER.sub("", OUTER.sub("", path))


def heads(model: nn.Module, found: dict[int, Place]) -> set[int]:
    """The ids of the output heads, and of the modules in them: of a transformers model, all that is not in its backbone."""
    ids: set[int] = set()
    known = False
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", "")
        if isinstance(prefix, str) and hasattr(module, "get_output_embeddings"):
            known = True
            backbone = getattr(module, prefix, None) if prefix else None
            if isinstance(backbone, nn.Module):
                inner = {id(one) for one in backbone.modules()}
                ids |= {id(one) for one in module.modules() if id(one) not in inner}
            head: Any = _output_embeddings(module)
            ids |= {id(one) for one in head.modules()} if isinstance(head, nn.Module) else set()
    ids |= {key for key, place in found.items() if known and is_head_path(place.bare)}
    return ids


def mark(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Notes on `parent` whether its child `name` is on a grid."""
    names = set(getattr(parent, MARK, ()))
    (names.add if isinstance(module, (Prepared, *CONVERTED)) else names.discard)(name)
    setattr(parent, MARK, frozenset(names))


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` is one of peft's: an adapter around a layer, or the copy of a module that trains."""
    return _held(module) is not None or _is_copy(module)


def obstacle_to_merge(model: nn.Module) -> str:
    """Why peft cannot merge an adapter of `model`, with its path; empty where it can. Tries it on a copy of one of each kind."""
    tried = set()
    for path, module in model.named_modules():
        levels = _levels(module)
        base: Any = _held(levels[-1]) if levels else None
        kind = (*map(type, levels), type(base), getattr(base, "bias", None) is None)
        if (
            not levels
            or kind in tried
            or isinstance(base, CONVERTED)
            or any(one.is_meta for one in module.parameters())
        ):
            continue
        tried.add(kind)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _merge(_levels(deepcopy(module)))
        except Exception as error:  # whatever a method of peft's raises: the user reads its own words
            return (
                f"{path} is inside of a {_name(module)}, which cannot be merged ({str(error) or type(error).__name__})"
            )
    return ""


def unwrap(model: nn.Module) -> tuple[nn.Module, dict[str, Update]]:
    """`model` without peft's wrappers, and the updates of converted layers by their paths, which are still to be merged.

    peft itself merges adapters on float and prepared layers.

    Raises:
        StageError: an adapter on a converted layer is no LoRA or DoRA on a linear layer, or there are several.
    """
    for module in model.modules():
        if _has_prompts(module):
            raise StageError(
                f"cannot merge: the prompts of a {_name(module)} are no weights: save them by model.save_pretrained(folder), and "
                "convert model.get_base_model()"
            )
    updates: dict[str, Update] = {}
    while found := list(_wrappers(model)):  # a copy may have adapters inside
        for parent, name, child in found:
            children(parent)[name] = _taken_off(model, child, updates)
    whole: Any = model
    bare: nn.Module = whole.get_base_model() if hasattr(model, "get_base_model") else model
    for note in ("peft_config", "active_adapter"):  # as peft's own merge_and_unload leaves the model
        if note in bare.__dict__:
            delattr(bare, note)
    if getattr(bare, "_hf_peft_config_loaded", False):
        setattr(bare, "_hf_peft_config_loaded", False)  # noqa: B010  transformers' own mark
    return bare, updates


def _taken_off(model: nn.Module, wrapper: nn.Module, updates: dict[str, Update]) -> nn.Module:
    """The module inside of a wrapper, with its adapters merged; those of a converted layer are put into `updates`."""
    if _is_copy(wrapper):
        return _active_copy(wrapper)
    levels = _levels(wrapper)
    base = _held(levels[-1])
    if isinstance(base, CONVERTED):
        path = next(path for path, one in model.named_modules() if one is base)
        if (update := _update(levels, path)) is not None:
            updates[bare_path(path)] = update
    else:
        _merge(levels)
        base = _held(levels[-1])  # some methods put another module there
    assert base is not None
    if isinstance(base, (Prepared, FakeExperts)):
        base.train(base.training)  # drops the values of before
    return base


def _merge(levels: list[Any]) -> None:
    for one in reversed(levels):  # each merges into the innermost module
        if hasattr(one, "merge") and one.active_adapters:
            one.merge()


def _levels(module: Any) -> list[Any]:
    """`module` and the wrappers in it, down to the layer, the outermost first; none where it is no adapter."""
    held = _held(module)
    return [] if held is None else [module, *_levels(held)]


def _held(module: Any) -> nn.Module | None:
    """The module inside of an adapter of peft's."""
    return next((one for name in HELD if isinstance(one := getattr(module, name, None), nn.Module)), None)


def _wrappers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and wrapper, of the outermost wrappers."""
    inner: set[int] = set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_wrapper(child) and id(parent) not in inner:
                inner |= {id(one) for one in child.modules()}
                yield parent, name, child


def _is_part(parent: nn.Module, name: str) -> bool:
    """Whether the child `name` of a wrapper, or of a module in it, is the wrapper's own."""
    if _is_copy(parent):
        return name not in ("original_module", "modules_to_save")
    if _has_prompts(parent):
        return name == PROMPTS
    return is_wrapper(parent) and name not in HELD


def _has_prompts(module: nn.Module) -> bool:
    """Whether `module` is a model of peft's that learns prompts, and has no adapters."""
    return isinstance(getattr(module, PROMPTS, None), nn.Module) and hasattr(module, "get_base_model")


def _is_copy(module: nn.Module) -> bool:
    """Whether `module` is peft's ModulesToSaveWrapper, or of its kind."""
    copies = getattr(module, "modules_to_save", None)
    return isinstance(copies, nn.ModuleDict) and isinstance(getattr(module, "original_module", None), nn.Module)


def _active_copy(wrapper: Any) -> nn.Module:
    active: Any = wrapper.active_adapters if hasattr(wrapper, "active_adapters") else wrapper.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    copies = [wrapper.modules_to_save[name] for name in names if name in wrapper.modules_to_save]
    chosen: nn.Module = copies[0] if copies else wrapper.original_module
    return chosen


def _adapts(module: nn.Module) -> bool:
    """Whether `module` has factors of an adapter, by their usual names."""
    names = [
        *(name for name, _ in module.named_parameters(recurse=False)),
        *(name for name, _ in module.named_children()),
    ]
    return any(name.lower().startswith(("lora_", "adaption_")) for name in names)


def _name(module: nn.Module) -> str:
    """The class of a wrapper; of peft's with the method, such as `lora.Linear`."""
    parts, name = type(module).__module__.split("."), type(module).__name__
    return f"{parts[2]}.{name}" if parts[:2] == ["peft", "tuners"] and len(parts) > 3 else name


def _is_of(module: nn.Module, methods: tuple[str, ...]) -> bool:
    """Whether `module` is a layer of one of these methods of peft's."""
    return type(module).__module__.startswith(tuple(f"peft.tuners.{method}." for method in methods))


def _output_embeddings(module: Any) -> Any:
    try:
        return module.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _update(levels: list[Any], path: str) -> Update | None:
    """The adapter of peft's on a converted layer; None where it is switched off."""
    wrapper = levels[0]
    names = [name for name in wrapper.active_adapters if name in getattr(wrapper, "lora_A", {})]
    if len(levels) > 1 or wrapper.merged or len(names) > 1 or "lora_A" not in children(wrapper):
        raise StageError(
            f"cannot merge: {path} is converted, and its {type(wrapper).__name__} is not one LoRA or DoRA: leave one on it"
        )
    if not names:
        return None
    name = names[0]
    if getattr(wrapper, "lora_bias", {}).get(name):
        raise StageError(f"cannot merge: {path} is converted, and its adapter has a bias: leave lora_bias out")
    vectors = getattr(wrapper, "lora_magnitude_vector", {})
    magnitude = _array(vectors[name].weight).reshape(-1) if name in vectors else None
    factors = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    return Update(_array(factors[0]), _array(factors[1]), float(wrapper.scaling[name]), magnitude)


def _array(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return tensor.detach().to("cpu", torch.float32).numpy().copy()
