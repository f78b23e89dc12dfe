"""The experts of an artifact, stored one by one, for the layers of a model that have all experts of a block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.known import model_path
from qkit.artifact.metadata import StoredRule
from qkit.engines.abilities import require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Modules
from qkit.errors import ArtifactError, GridError
from qkit.expert_inputs import name_of
from qkit.experts import Codes, blocks_of, module_name
from qkit.formats import compressed_tensors
from qkit.formats.packed import join
from qkit.reference.ranges import check_static, static_contents
from qkit.rules import Rule

Arrays = dict[str, NDArray[Any]]
Place = tuple[int, str]  #: number of an expert and name of a projection


def take_experts(
    folder: Path,
    arrays: Arrays,
    layers: Mapping[str, Layer],
    rules: Sequence[StoredRule],
    config: Mapping[str, Any] | None,
) -> dict[str, tuple[Codes, Rule, Arrays]]:
    """The codes and the rule of every block of quantized experts, by the path of its layer. Removes their tensors from `arrays`.

    Raises:
        ArtifactError: the model has no such experts, or some of them are missing or not sound.
    """
    found: dict[str, dict[Place, tuple[str, StoredRule]]] = {}
    for one in rules:
        if one.rule.kind == "experts":
            for place, places in blocks_of(one.paths).items():
                mine = {where: (path, one) for where, path in places.items()}
                found.setdefault(_block_of(place, layers, config), {}).update(mine)
    out: dict[str, tuple[Codes, Rule, Arrays]] = {}
    for block, held in found.items():
        places = {where: path for where, (path, _) in held.items()}
        layer = _layer(folder, layers, block, places)
        rule = _common_rule([stored.rule for _, stored in held.values()], f"{folder}: the experts of {block}")
        codes: Codes = {name: [] for name in layer.projections}
        for name, shape in layer.projections.items():
            for number in range(shape[0]):
                q = _take(folder, arrays, *held[number, name], shape[1:])
                codes[name].append(q if q.grid == rule.weight else replace(q, grid=rule.weight))
        out[block] = codes, rule, _static(folder, arrays, layer, places, rule)
    return out


def _common_rule(rules: Sequence[Rule], experts: str) -> Rule:
    """The rule of a block of experts. Of integers of several widths with the scales of a file, the widest has all codes.

    mlx-lm gives the projections of a block several widths. A code means the same number in more bits.

    Raises:
        ArtifactError: no grid has all codes.
    """
    widest = max(rules, key=lambda rule: rule.weight.element.bits if rule.weight else 0)
    grids = {rule.weight for rule in rules if rule.weight}
    integers = all(grid.read and grid.element.kind == "integer" for grid in grids)
    kinds = {(grid.group, grid.scale) for grid in grids}
    if len({replace(rule, match=("*",), weight=widest.weight) for rule in rules}) > 1 or (
        len(grids) > 1 and not (integers and len(kinds) == 1)
    ):
        names = ", ".join(sorted(map(str, grids)))
        raise ArtifactError(f"{experts} are on several grids, {names}: quantize the model again")
    return widest


def stack_experts(
    engine: Modules, folder: Path, arrays: Arrays, layers: Mapping[str, Layer], config: Mapping[str, Any] | None
) -> None:
    """Puts the float experts among `arrays` that are stored one by one under the names that `engine` has for them.

    Raises:
        ArtifactError: an expert is missing, or has another shape.
    """
    single = blocks_of(name.removesuffix(".weight") for name in arrays if name.endswith(".weight"))
    for place, places in single.items():
        block = _block_of(place, layers, config)
        if block not in layers or layers[block].kind != "experts":
            continue
        layer = _layer(folder, layers, block, places)
        weights = {}
        for name, shape in layer.projections.items():
            parts = [arrays.pop(f"{places[number, name]}.weight") for number in range(shape[0])]
            for part in parts:
                if part.shape != shape[1:]:
                    raise ArtifactError(
                        f"{folder}: {block} has a {name} of {list(part.shape)} in the files and of {list(shape[1:])} in the model"
                    )
            weights[name] = np.stack(parts)
        arrays.update(require(engine, Mixes).stack_experts(layer, weights))


def _block_of(place: str, layers: Mapping[str, Layer], config: Mapping[str, Any] | None) -> str:
    """The path in the model of the experts at `place` in files."""
    named = module_name(f"{place}.", config)[:-1]
    other = model_path(place, config)
    return other if named not in layers and other in layers else named


def _layer(folder: Path, layers: Mapping[str, Layer], block: str, places: Mapping[Place, str]) -> Layer:
    """The layer at `block`, all of whose experts are among `places`, and no others."""
    layer = layers.get(block)
    if layer is None or layer.kind != "experts" or layer.obstacle:
        why = layer.obstacle if layer and layer.obstacle else "it has none there"
        raise ArtifactError(f"{folder}: the model cannot take the experts of {block}: {why}")
    wanted = {(number, name) for name, shape in layer.projections.items() for number in range(shape[0])}
    if differing := sorted(wanted ^ places.keys()):
        number, name = differing[0]
        which = "missing in the files" if differing[0] in wanted else "not in the model"
        raise ArtifactError(f"{folder}: {block}.{number}.{name} is {which}")
    return layer


def _static(folder: Path, arrays: Arrays, layer: Layer, places: Mapping[Place, str], rule: Rule) -> Arrays:
    """The static scales of all experts, by the names of `static_names`. Removes them from `arrays`."""
    found: dict[str, dict[int, NDArray[Any]]] = {}
    for (number, projection), path in sorted(places.items()):
        stored = {name: arrays.pop(join(path, name), None) for name in static_contents(rule)}
        try:
            checked = check_static(stored, rule)
        except ArtifactError as error:
            raise ArtifactError(f"{folder}: {path}: {error}") from None
        for name, array in checked.items():
            before = found.setdefault(name_of(name, projection), {}).setdefault(number, array)
            if not np.array_equal(before, array):
                raise ArtifactError(
                    f"{folder}: {path}: {name} of gate and up differ, and they have one input: quantize the model again"
                )
    count = layer.shape[0]
    return {name: np.concatenate([one[number] for number in range(count)]) for name, one in found.items()}


def _take(folder: Path, arrays: Arrays, path: str, stored: StoredRule, shape: tuple[int, ...]) -> Any:
    grid = stored.rule.weight
    assert grid is not None
    for name in compressed_tensors.server_tensors(stored.rule):
        arrays.pop(join(path, name), None)
    try:
        there = {name for name in compressed_tensors.NAMES if join(path, name) in arrays}
        form = compressed_tensors.stored_form(there, grid)
        names = compressed_tensors.contents(grid, dtype=stored.dtype, shape=shape, form=form)
        found = {name: arrays.pop(join(path, name)) for name in names if join(path, name) in arrays}
        return compressed_tensors.from_tensors(found, grid=grid, dtype=stored.dtype, shape=shape)
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{folder}: {path}: {error}") from None
