"""Modules whose `forward` another library has replaced on the object: tensor parallelism of transformers, hooks of accelerate."""

from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from qkit_torchao.layers.sharded import is_shard

FORWARD = "forward"
OLD = "_old_forward"  #: where accelerate puts the forward that its own one calls


def why_not(module: nn.Module) -> str:
    """Why no other class can compute in the place of that of `module`: its `forward` does not call it; else empty."""
    patched = module.__dict__.get(FORWARD)
    patched = getattr(patched, "unwrapped", patched)
    if patched is None or _rebound(patched, module, module)[1]:
        return ""
    name = getattr(patched, "__qualname__", type(patched).__name__)
    return f"its forward was replaced by {name}, which qkit cannot see into: prepare or convert the model before"


def rebind(layer: Any, module: nn.Module) -> None:
    """Has the replaced `forward` of `module`, which `layer` got with its other attributes, call the class of `layer`."""
    patched = layer.__dict__.get(FORWARD)
    if patched is None:
        return
    patched = getattr(patched, "unwrapped", patched)
    old = layer.__dict__.get(OLD)
    if isinstance(old, MethodType):
        layer.__dict__[OLD] = MethodType(type(layer).forward, layer)
    forward, _ = _rebound(patched, module, layer)
    layer.__dict__[FORWARD] = _going_back(forward) if is_shard(getattr(layer, "weight", None)) else forward


def _rebound(patched: Any, module: nn.Module, layer: Any) -> tuple[Callable[..., Any], bool]:
    """`patched` with `layer` for `module` in all that it refers to, and whether it refers to the forward of `module`."""
    if isinstance(patched, partial):
        arguments = [layer if one is module else one for one in patched.args]
        bound = partial(patched.func, *arguments, **patched.keywords)
        return update_wrapper(bound, type(layer).forward), any(one is module for one in patched.args)
    cells = getattr(patched, "__closure__", None)
    if not isinstance(patched, FunctionType) or cells is None:
        return patched, False
    found = [_of(cell.cell_contents, module, layer) for cell in cells]
    calls = any(
        isinstance(cell.cell_contents, MethodType) and one is not None for cell, one in zip(cells, found, strict=True)
    )
    closure = tuple(cell if one is None else CellType(one) for cell, one in zip(cells, found, strict=True))
    made = FunctionType(patched.__code__, patched.__globals__, patched.__name__, patched.__defaults__, closure)
    made.__kwdefaults__ = patched.__kwdefaults__
    return made, calls


def _of(value: Any, module: nn.Module, layer: Any) -> Any:
    """`layer` for `module`, and its forward for that of `module`; None for all else."""
    if value is module:
        return layer
    if isinstance(value, MethodType) and value.__self__ is module and value.__func__.__name__ == FORWARD:
        return MethodType(type(layer).forward, layer)
    return None


def _going_back(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with gradients on: without, transformers gives a layer its part alone, whose groups may lie in several parts."""

    @wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*inputs, **named)
        with torch.enable_grad():
            result = forward(*inputs, **named)
        return result.detach()

    run.unwrapped = forward  # type: ignore[attr-defined]
    return run
