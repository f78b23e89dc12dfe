"""Adapters of experts in files: peft has one for each parameter of transformers' module, and mlx-lm one for each stack.

peft (0.21) puts one wrapper into the other where a module has several such parameters, so that names alone do not tell which
is which: the first parameter is innermost. Gate and up are one parameter there, whose adapter has one A for both.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer
from qkit.errors import ArtifactError
from qkit.experts import file_name
from qkit.formats.mlx_config import stack_path
from qkit.reference.merged import Update

Parts = dict[str, NDArray[Any]]
WRAPPED = ".base_layer"  #: in peft's names, once for every wrapper around
BOTH = "gate_up_proj"
GATE_UP = ("gate_proj", "up_proj")


def as_in_peft(path: str, part: str, array: NDArray[Any], updates: Mapping[str, Update]) -> tuple[str, NDArray[Any]]:
    """The path in peft's files of an array of the update of `path`, one of `updates`; and the array as it lies there."""
    if updates[path].a.ndim == 2:
        return path, array
    block = path.rpartition(".")[0]
    around = sum(one.rpartition(".")[0] == block and _order(one) > _order(path) for one in updates)
    if part == "a":
        array = array.reshape(-1, array.shape[-1])
    elif part == "b":
        array = array.transpose(1, 2, 0).reshape(array.shape[1], -1)
    return block + WRAPPED * around, array


def parted(arrays: Mapping[str, Parts], config: Mapping[str, Any], file: Path) -> dict[str, Parts]:
    """`arrays` of peft's files by path, with those of parameters of experts [experts, ...] under the path of the parameter.

    Raises:
        ArtifactError: they are not those that `target_parameters` names.
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ArtifactError(f"{file}: target_parameters is {targets!r}: want a list of names")
    out: dict[str, Parts] = {}
    blocks: dict[str, dict[int, Parts]] = {}
    for path, parts in arrays.items():
        block = path.replace(WRAPPED, "")
        if any(_ends(block, one.rpartition(".")[0]) for one in targets):
            blocks.setdefault(block, {})[path.count(WRAPPED)] = parts
        else:
            out[path] = parts
    for block, found in blocks.items():
        names = {one.rpartition(".")[2] for one in targets if _ends(block, one.rpartition(".")[0])}
        ordered = sorted((f"{block}.{name}" for name in names), key=_order)
        if set(found) != set(range(len(ordered))):
            raise ArtifactError(
                f"{file}: {block} has {len(found)} adapters, and target_parameters names {', '.join(sorted(names))} there"
            )
        for around, path in enumerate(reversed(ordered)):
            out[path] = _by_expert(found[around], _rank(path, config), path, file)
    return out


def joined(
    updates: Mapping[str, Update], layers: Mapping[str, Layer]
) -> tuple[dict[str, Update], dict[str, list[int]]]:
    """`updates` of projections as those of transformers' parameters, all of one rank; and by such a path the ranks inside.

    One rank, since peft warns of a rank for a parameter, and filled with zeros, which change nothing. The ranks inside are those
    of gate and up where each has a part to itself, or the one of all the parameter's projections.

    Args:
        layers: the experts of the model, by path.
    """
    out = dict(updates)
    ranks: dict[str, list[int]] = {}
    for block, layer in layers.items():
        for name in layer.projections:
            if (path := f"{block}.{name}") in out:
                ranks[path] = [out[path].rank]
        mine = {name: out.pop(f"{block}.{name}") for name in GATE_UP if f"{block}.{name}" in out}
        if "gate_proj" in layer.projections and mine:
            out[path := f"{block}.{BOTH}"], apart = _join(mine, layer)
            ranks[path] = [mine[name].rank if name in mine else 0 for name in GATE_UP] if apart else [out[path].rank]
        elif mine:
            out[f"{block}.up_proj"] = mine["up_proj"]
    ranks = {path: inside for path, inside in ranks.items() if path in out}
    most = max((out[path].rank for path in ranks), default=0)
    return {path: _filled(one, most) if path in ranks else one for path, one in out.items()}, ranks


def split(
    updates: Mapping[str, Update], layers: Mapping[str, Layer], ranks: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Update]:
    """`updates` by the paths of projections of experts, whichever of the two layouts they had: the inverse of `joined`.

    Args:
        ranks: as `joined` returned them.
        config: of the model.
    """
    own = {
        mine: f"{block}.{name}" for block, layer in layers.items() for name, mine in mlx_paths(layer, config).items()
    }
    out: dict[str, Update] = {}
    for path, update in updates.items():
        block, _, name = path.rpartition(".")
        inside = ranks.get(path) or [update.rank]
        if update.a.ndim == 3 and (sum(inside) > update.rank or len(inside) > 2):
            raise ArtifactError(f"{path} has rank {update.rank}, and is noted to have {inside}: fetch it again")
        if name == BOTH and block in layers and update.a.ndim == 3:
            out.update({f"{block}.{one}": part for one, part in _split(update, layers[block], inside).items()})
        elif update.a.ndim == 3:
            out[own.get(path, path)] = _cut(update, slice(0, inside[0]), lambda array: array)
        else:
            out[path] = update
    return out


def mlx_paths(layer: Layer, config: Mapping[str, Any]) -> dict[str, str]:
    """The path of the stack of each projection in mlx-lm's model."""
    if all(name.endswith(".weight") for name in layer.stored):
        return {name: own.removesuffix(".weight") for name, own in zip(layer.projections, layer.stored, strict=True)}
    block = file_name(f"{layer.path}.", config)[:-1]
    return {name: stack_path(block, name, config) for name in layer.projections}


def _join(mine: Mapping[str, Update], layer: Layer) -> tuple[Update, bool]:
    """One update for gate and up, and whether each has a part of the rank to itself."""
    given = next(iter(mine.values()))
    nothing = Update(np.zeros_like(given.a[:, :1]), np.zeros_like(given.b[..., :1]), given.scale, given.magnitude)
    gate, up = (mine.get(name, nothing) for name in GATE_UP)
    if gate.scale != up.scale or gate.kind != up.kind:
        raise ArtifactError(
            f"gate and up of {layer.path} have adapters of two scales or kinds, and are one parameter: save as mlx-lm"
        )
    apart = not np.array_equal(gate.a, up.a)
    a, b_gate, b_up = gate.a, gate.b, up.b
    if apart:  # each has columns of its own, and zeros in those of the other
        a = np.concatenate([gate.a, up.a], axis=1)
        b_gate = np.pad(gate.b, ((0, 0), (0, 0), (0, up.rank)))
        b_up = np.pad(up.b, ((0, 0), (0, 0), (gate.rank, 0)))
    magnitude = None
    if gate.magnitude is not None and up.magnitude is not None:
        magnitude = _together(gate.magnitude, up.magnitude, layer)
    return Update(a, _together(b_gate, b_up, layer), gate.scale, magnitude), apart


def _split(update: Update, layer: Layer, inside: Sequence[int]) -> dict[str, Update]:
    first, last = (0, inside[0]), (inside[0], sum(inside)) if len(inside) > 1 else (0, inside[0])
    return {
        name: _cut(update, slice(*columns), _half(layer, number))
        for number, (name, columns) in enumerate(zip(GATE_UP, (first, last), strict=True))
        if columns[0] < columns[1]
    }


def _cut(update: Update, columns: slice, rows: Callable[[NDArray[Any]], NDArray[Any]]) -> Update:
    magnitude = None if update.magnitude is None else rows(update.magnitude).copy()
    return Update(update.a[:, columns].copy(), rows(update.b)[..., columns].copy(), update.scale, magnitude)


def _filled(update: Update, rank: int) -> Update:
    """`update` with zeros up to `rank`."""
    more = rank - update.rank
    a, b = np.pad(update.a, ((0, 0), (0, more), (0, 0))), np.pad(update.b, ((0, 0), (0, 0), (0, more)))
    return Update(a, b, update.scale, update.magnitude)


def _together(first: NDArray[Any], second: NDArray[Any], layer: Layer) -> NDArray[Any]:
    """Rows of gate and up, [experts, outputs, ...], as they lie in one parameter."""
    if not layer.interleaved:
        return np.concatenate([first, second], axis=1)
    return np.stack([first, second], axis=2).reshape(len(first), -1, *first.shape[2:])


def _half(layer: Layer, number: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The inverse of `_together` for gate, 0, or up, 1."""
    if layer.interleaved:
        return lambda array: array[:, number::2]
    return lambda array: np.split(array, 2, axis=1)[number]


def _by_expert(parts: Parts, rank: int, path: str, file: Path) -> Parts:
    out = dict(parts)
    if "a" in parts and "b" in parts:
        a, b = parts["a"], parts["b"]
        if a.ndim != 2 or b.ndim != 2 or len(a) % rank or b.shape[1] != len(a):
            raise ArtifactError(
                f"{file}: the factors of {path} are {a.shape} and {b.shape}, which rank {rank} does not divide"
            )
        out["a"] = a.reshape(-1, rank, a.shape[1])
        out["b"] = np.ascontiguousarray(b.reshape(len(b), rank, -1).transpose(2, 0, 1))
    return out


def _rank(path: str, config: Mapping[str, Any]) -> int:
    """The rank of peft's adapter on the parameter at `path`."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return max(int(rank), 1)
    return max(int(config.get("r") or 1), 1)


def _order(path: str) -> bool:
    return path.endswith(".down_proj")


def _ends(path: str, end: str) -> bool:
    return not end or f".{path}".endswith(f".{end}")
