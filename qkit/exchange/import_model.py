"""Model directories of any layout that qkit reads, as snapshots, and a snapshot as an artifact. Codes are never changed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qkit.artifact.config import quantized_config, read_config
from qkit.artifact.families import HEAD, layer_of
from qkit.artifact.foreign import kind_of_path, open_any
from qkit.artifact.metadata import KEY, describe
from qkit.artifact.mlx_experts import without_stacks
from qkit.artifact.snapshot import Snapshot, StoredWeight, locating, read_own, stored_weight, take_parts
from qkit.artifact.transformers_experts import has_single
from qkit.engines.layer import Layer
from qkit.errors import ArtifactError
from qkit.exchange.read_foreign import read_foreign
from qkit.exchange.shared_scales import share_scales
from qkit.exchange.write_model import check_weights_only, rules_of, write_model
from qkit.experts import is_router, paths_of
from qkit.formats import compressed_tensors, dense, mlx_config, mlx_lm
from qkit.formats.packed import Tensors, join
from qkit.formats.settings import check_remaining
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.rules import Rule
from qkit.sources.decoded import DecodedArray
from qkit.sources.detect import FLOAT, detect
from qkit.sources.gguf_file import open_gguf
from qkit.sources.mlx import weights_of, whole_heads
from qkit.sources.mlx_names import renamed
from qkit.sources.parts import float_type
from qkit.sources.source import stored_types
from qkit.storage import read
from qkit.storage.layout import SHARD_BYTES, TYPE_NAMES, Slot
from qkit.storage.other_models import GGUF
from qkit.storage.seal import check_seal

FOREIGN = (
    "; qkit holds a model exactly or not at all: open it with the program that wrote it, or quantize the float model"
)


def read_model(folder: str | Path, *, minmax: bool = False) -> Snapshot:
    """The content of `folder`: an artifact or export of qkit's, a float model, or one that another program quantized.

    `folder` may be a GGUF file.

    Reads every byte of the weights once where `qkit.json` has digests to compare.

    Args:
        minmax: reads weights of mlx-lm as `minmax` where all biases are whole numbers of scales, and not as `affine`.

    Raises:
        ArtifactError: the model is unsound, is quantized in another way, or has a quantized weight that no grid of qkit's
            describes; or qkit wrote the directory, and a file has changed since.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name.lower().endswith(GGUF):
        return read_foreign(open_gguf(folder), {})
    stored, metadata = read.read_folder(folder)
    check_seal(folder, stored, digests=True)
    return (
        read_own(folder, headers=(stored, metadata)) if KEY in metadata else _read_other(folder, stored, minmax=minmax)
    )


def open_model(folder: str | Path) -> Snapshot:
    """As `read_model`, but the bytes of an artifact or export of qkit's are not compared with its digests here.

    They are `sealed` in the snapshot. A copy carries digests on, and compares the tensors that it computes with. Raises as
    `read_model`.
    """
    folder = Path(folder)
    if folder.is_file():
        return read_model(folder)
    stored, metadata = read.read_folder(folder)
    if KEY not in metadata:
        return read_model(folder)
    return read_own(folder, digests=check_seal(folder, stored, digests=False), headers=(stored, metadata))


def _read_other(folder: Path, stored: Mapping[str, read.Stored], *, minmax: bool) -> Snapshot:
    """A float model, or one that another tool quantized."""
    config = read_config(folder)
    with locating(folder):
        found = detect(folder, config, stored_types(stored))
    if found.method == FLOAT:
        return Snapshot(folder, FLOAT, False, config, {}, read.map_tensors(stored))
    if found.method == "mlx":
        return _mlx(folder, dict(stored), found.config or {}, found.settings, minmax=minmax)
    return read_foreign(open_any(folder, stored, config), stored)


def to_artifact(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as an artifact, which `qkit.load` opens, with the same codes and scales.

    Weights on `nvfp4` that servers fuse get one tensor scale; see `share_scales`.

    Raises:
        ArtifactError: a tensor scale cannot be shared exactly; or see `Output`.
    """
    check_weights_only(source, [path for path, weight in source.weights.items() if weight.unknown])
    for path, weight in source.weights.items():
        assert weight.rule.weight is not None
        try:
            compressed_tensors.layout(weight.rule.weight)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    source = share_scales(source)
    known = source.config or {}
    layers = [layer_of(Slot(name, TYPE_NAMES[a.dtype.name], a.shape), known) for name, a in source.tensors.items()]
    left_alone = [layer.path for layer in layers if isinstance(layer, Layer) and layer.kind == "linear"]
    left_alone += [HEAD] if source.tied else []
    left_alone += [
        path for name in source.tensors if (path := name.removesuffix(".weight")) != name and is_router(path)
    ]
    single = has_single(source.tensors)
    config = quantized_config(source.config, rules_of(source), left_alone=left_alone, single_experts=single)
    about = json.loads(describe(rules_of(source), fit=source.fit))
    write_model(source, out, compressed_tensors, about=about, config=config, shard_bytes=shard_bytes)


def _mlx(
    folder: Path, stored: dict[str, read.Stored], config: dict[str, Any], stated: Mapping[str, Any], *, minmax: bool
) -> Snapshot:
    """A model that mlx-lm quantized. Its tensor names are transformers' for most types of models."""
    with locating(folder):
        stored, stated, config = renamed(stored, stated, config)
        found = weights_of(stored, stated, config)
        heads = whole_heads(stored, found, config, float_type(config, stored))
    tensors: Tensors = read.map_tensors(stored)
    weights: dict[str, StoredWeight] = {}
    routers, affine, whole = list[str](), list[str](), list[str]()
    for path, (container, shape) in found.items():
        stacked = len(shape) == 3
        parts = {name: tensors[join(path, name)] for name in mlx_lm.NAMES if join(path, name) in tensors}
        with locating(folder, path):
            dtype = _dtype(parts["scales"], config)
            grid = mlx_lm.grid_of(parts, container, dtype=dtype)
        if grid.has_biases:
            affine.append(path)
            if mlx_lm.is_whole(parts, container):
                whole.append(path)
                grid = Grid(grid.element, grid.group, "minmax") if minmax else grid
        if stacked:
            weights |= _stack(folder, tensors, path, grid, dtype, config)
            continue
        parts = take_parts(tensors, path, "mlx")
        rule = Rule(("*",), kind=kind_of_path(path), weight=grid)
        weight = stored_weight(folder, path, "mlx", parts, rule=rule, dtype=dtype, shape=shape, way_out=FOREIGN)
        if is_router(path):
            routers.append(path)
            tensors[join(path, "weight")] = dense.store(weight.read())["weight"]
        else:
            weights[path] = weight
    tensors = without_stacks(tensors, weights, config)
    _check_remaining(folder, tensors)
    decoded: dict[str, Any] = {name: DecodedArray(one) for name, one in heads.items()}
    tensors |= decoded
    notes = tuple(_notes(routers, list(heads), affine, whole, minmax=minmax))
    return Snapshot(folder, "mlx", True, config, weights, tensors, notes=notes)


def _notes(routers: list[str], heads: list[str], affine: list[str], whole: list[str], *, minmax: bool) -> Iterator[str]:
    if routers:
        yield (
            f"{len(routers)} quantized routers, such as {routers[0]}, are read as their values in float: qkit leaves "
            "routers float"
        )
    if heads:
        yield (
            f"{len(heads)} weights that mlx-lm stores as two stacks of heads, such as {heads[0]}, are read as their values in "
            "float: their groups run across rows, and no grid has such"
        )
    if whole and not minmax:
        yield (
            f"every bias of {len(whole)} of {len(affine)} affine weights, such as {whole[0]}, is a whole number of scales: "
            "--minmax reads these weights as minmax, the same values with zero points, which more programs open"
        )


def _stack(
    folder: Path, tensors: Tensors, path: str, grid: Grid, dtype: DType, config: dict[str, Any]
) -> dict[str, StoredWeight]:
    """The weights of the experts in the stack at `path` in mlx-lm, by their paths in other files."""
    with locating(folder, path):
        parts = take_parts(tensors, path, "mlx")
        block, projection = mlx_config.block_of(path, config)
    rule, shape = Rule(("*",), kind="experts", weight=grid), mlx_lm.shape_of(parts, grid)[1:]
    paths = paths_of(block, {projection: (len(parts["weight"]),)}, config)
    return {
        mine: stored_weight(
            folder,
            mine,
            "mlx",
            {name: array[number] for name, array in parts.items()},
            rule=rule,
            dtype=dtype,
            shape=shape,
            way_out=FOREIGN,
        )
        for (number, _), mine in paths.items()
    }


def _check_remaining(folder: Path, tensors: Tensors) -> None:
    with locating(folder):
        check_remaining({name: array.dtype.name for name, array in tensors.items()})


def _dtype(scale: NDArray[Any], config: Mapping[str, Any]) -> DType:
    """The type of a weight before it was quantized: that of its scales or, where scales are codes, of the model."""
    names = (scale.dtype.name, config.get("dtype"), config.get("torch_dtype"))
    found = next((dtype for name in names for dtype in DTYPES if name == dtype), None)
    if found is None:
        raise ArtifactError(
            "neither its scales nor config.json say of what type the weight was: add dtype to config.json"
        )
    return found
