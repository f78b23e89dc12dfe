"""Models that other programs quantized, as snapshots: codes on grids where a grid holds them, values of all others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.families import layer_of
from qkit.artifact.foreign import kind_of_path
from qkit.artifact.snapshot import Snapshot, StoredWeight, locating, stored_weight
from qkit.errors import ArtifactError
from qkit.experts import Member, is_router
from qkit.formats import compressed_config, compressed_tensors
from qkit.formats.packed import Tensors
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.reference.packing import Packed
from qkit.rules import Kind, Rule
from qkit.sources.decoded import DecodedArray
from qkit.sources.detect import FLOAT
from qkit.sources.encoded import Encoded
from qkit.sources.grids import grid_of, member_rows, packed_weight
from qkit.sources.source import Source
from qkit.storage import layout, read
from qkit.storage.read import Stored


def read_foreign(source: Source, stored: Mapping[str, Stored]) -> Snapshot:
    """The model of `source`, whose files hold the tensors `stored`.

    Raises:
        ArtifactError: settings are not readable, or a weight is not sound.
    """
    weights: dict[str, StoredWeight] = {}
    values: dict[str, Any] = {}
    config = source.detected.config or {}
    ours = _on_own_grids(source) if source.detected.method == "compressed-tensors" else {}
    for name, encoded in source.encoded.items():
        path = name.removesuffix(".weight")
        with locating(source.folder, path):
            grid, moving = ours.get(path, (None, False))
            own = grid and _own(source, path, encoded, grid)
            held = {path: own} if own else _held(source, name, encoded, config)
        if held:
            weights.update((one, replace(weight, unknown=_moving(moving))) for one, weight in held.items())
        else:
            values[name] = DecodedArray(encoded)
    floats = {name: one for name, one in source.tensors.items() if not isinstance(one, Encoded)}
    tensors = {**read.map_tensors(floats), **values}
    method = source.detected.method if weights else FLOAT
    notes = _notes(source, values)
    return Snapshot(
        source.folder, method, True, source.detected.config, weights, tensors, notes=notes, files=source.files
    )


def _notes(source: Source, values: Mapping[str, DecodedArray]) -> tuple[str, ...]:
    """Sentences about weights that became values, and scales that are left out."""
    decoded = {name: one.encoded for name, one in values.items()}
    some = replace(source, tensors={name: one for name, one in source.tensors.items() if name in decoded})
    return some.notes


def _moving(quantized: bool) -> str:
    return "its inputs or outputs" if quantized else ""


def _on_own_grids(source: Source) -> dict[str, tuple[Grid | None, bool]]:
    """By path: the grid of a weight in compressed-tensors' layout, and whether its inputs or outputs are quantized too."""
    names = {f"{name.removesuffix('weight')}{part}" for name, one in source.encoded.items() for part in one.parts}
    with locating(source.folder):
        return compressed_config.grids(source.detected.settings, names, kind_of=kind_of_path)


def _own(source: Source, path: str, encoded: Encoded, grid: Grid) -> StoredWeight | None:
    """The weight on a grid of qkit's own rules; None where its scales are none that qkit writes, or of another type."""
    parts: Tensors = {name: part.mapped() for name, part in encoded.parts.items()}
    dtype: DType = next(one for one in DTYPES if one == layout.DTYPES[encoded.slot.dtype][0])
    if parts["weight_scale"].dtype.name in DTYPES and parts["weight_scale"].dtype.name != dtype:
        return None  # such as scales in float16 of a bfloat16 model, which AutoRound writes
    stored = {**parts, "weight_scale": _widened(parts["weight_scale"], dtype)}
    rule = Rule(("*",), kind=kind_of_path(path), weight=grid)
    try:
        compressed_tensors.restore(stored, grid=grid, dtype=dtype, shape=encoded.slot.shape)
    except ArtifactError:
        return None
    return stored_weight(
        source.folder, path, "compressed-tensors", stored, rule=rule, dtype=dtype, shape=encoded.slot.shape
    )


def _held(source: Source, name: str, encoded: Encoded, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """The weights of `encoded` on the grid that holds their codes, by path; {} where no grid does."""
    found = layer_of(encoded.slot, config)
    grid = None if isinstance(found, str) or is_router(name.removesuffix(".weight")) else grid_of(encoded)
    if grid is None:
        return {}
    dtype: DType = next(one for one in DTYPES if one == layout.DTYPES[encoded.slot.dtype][0])
    scales = encoded.codes(slice(0, 1)).scales.dtype.name
    kind = scales if grid.read and grid.stored_scales == "float" else ""
    if not isinstance(found, Member) or found.expert is not None:
        kind_of: Kind = "experts" if isinstance(found, Member) else kind_of_path(name.removesuffix(".weight"))
        rule = Rule(("*",), kind=kind_of, weight=grid)
        read_it = _reader(source, name, encoded, grid, dtype)
        return {name.removesuffix(".weight"): StoredWeight(rule, dtype, encoded.slot.shape, read_it, kind=kind)}
    rule = Rule(("*",), kind="experts", weight=grid)
    return {
        path: StoredWeight(
            rule,
            dtype,
            found.shape,
            _reader(source, path, encoded, grid, dtype, member_rows(found, projection), expert),
            kind=kind,
        )
        for (expert, projection), path in found.paths.items()
    }


def _reader(
    source: Source,
    path: str,
    encoded: Encoded,
    grid: Grid,
    dtype: DType,
    rows: slice = slice(None),
    matrix: int = 0,
) -> Any:
    def read_weight() -> Packed:
        with locating(source.folder, path):
            return packed_weight(encoded, grid, dtype, rows=rows, matrix=matrix)

    return read_weight


def _widened(scale: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """`scale`, but float16 scales of a float16 model as float32, which is exact and which qkit stores."""
    return scale.astype(np.float32) if scale.dtype.name == dtype == "float16" else scale
