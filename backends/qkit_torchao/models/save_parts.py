"""An artifact of a model that is spread over processes: each encodes its own rows and writes them into place."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from qkit.artifact import save
from qkit.artifact.metadata import stored_rule
from qkit.artifact.servers import VLLM
from qkit.engines.layer import Layer, want_bare, want_merged, want_none_lost
from qkit.errors import RangeError, ServerWarning, StageError
from qkit.experts import file_name
from qkit.fused import shares
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.storage.destination import check_directory
from qkit.storage.layout import SHARD_BYTES
from qkit_torchao.layers import spread
from qkit_torchao.layers.sharded import is_shard
from qkit_torchao.models import surgery
from qkit_torchao.torch_private import local_part, place_of

CHECKPOINT = "_checkpoint_wrapped_module."  #: torch's part of the names of modules that are computed again going back
PARTS = ".parts"  #: ends the name of the directory beside the artifact in which processes meet


def save_sharded(
    model: nn.Module, folder: str | Path, *, source: str | Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a prepared model that FSDP2 or a tensor parallel plan has spread over processes; the bytes of `qkit.save`.

    Every process calls it, and all see one file system. Each quantizes its part of each weight and writes the codes into
    place, in a directory beside `folder`; the first process then writes the artifact from there. No process has more than the
    codes of one weight whole.

    Args:
        folder, source, shard_bytes: as in `qkit.save`.

    Returns:
        The folder, which is complete in every process.

    Raises:
        StageError: the model is not prepared, or has experts, adapters, learned scales or static ranges: save the model that
            `qkit.gather` returns.
        ArtifactError, PlanError, LockedError: as `qkit.save`.
    """
    from qkit_torchao.backend import TorchaoBackend

    engine, folder = TorchaoBackend(), Path(folder)
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    layers = _checked(list(surgery.layers(model)))
    config, origin = engine.config(model), save.origin_of(engine, model, source)
    first = distributed.get_rank() == 0
    error: Exception | None = None
    parts = folder.with_name(f".{folder.name}{PARTS}")
    if first:
        check_directory(folder)
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    distributed.barrier()
    plain, weights = _plain(model, layers), [layer for layer in layers if layer.rule and not layer.tied]
    if first:
        for name, tensor in plain.items():
            _map(parts, name, _dtype(tensor), tuple(tensor.shape), "w+")
        for layer in weights:
            for name, dtype, shape in _slots(layer):
                _map(parts, f"{layer.path}.{name}", dtype, shape, "w+")
    distributed.barrier()
    for name, tensor in plain.items():
        if first or is_shard(tensor):
            _write(parts, name, tuple(tensor.shape), engine.to_numpy(_local(tensor)), _place(tensor))
    try:
        broken = [layer.path for layer in weights if not _write_weight(engine, layer, parts, first=first)]
        if broken:
            raise RangeError(f"{broken[0]}.weight has numbers that are not finite: no code stands for them")
    except RangeError as raised:
        error = raised
    _raise_together(error, parts)
    if first:
        try:
            tensors = {
                file_name(name, config): _map(parts, name, _dtype(tensor), tuple(tensor.shape), "r")
                for name, tensor in plain.items()
            }
            found = save.assemble(
                [replace(layer, stage="converted" if layer.rule else layer.stage) for layer in layers],
                tensors,
                [(layer.path, stored_rule(layer.rule), _read(layer, parts)) for layer in weights if layer.rule],
                config,
                lay=lambda name, array: _laid(parts, name, array),
            )
            for text in found.served:
                warnings.warn(f"{VLLM}: {text}", ServerWarning, stacklevel=2)
            save.write(folder, found, config, origin, shard_bytes=shard_bytes)
        except Exception as raised:  # which every process shall raise
            error = raised
        shutil.rmtree(parts, ignore_errors=True)
    _raise_together(error, parts)
    return folder


def _raise_together(error: Exception | None, parts: Path) -> None:
    """Raises the first error of any process in every process, after removing the directory of parts."""
    errors: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, error)
    found = next((one for one in errors if one is not None), None)
    if found is not None:
        shutil.rmtree(parts, ignore_errors=True)
        raise found


def _checked(layers: list[Layer]) -> list[Layer]:
    """The layers of a model that can be saved so, by the paths that files have."""
    want_merged(layers, "save")
    want_bare(layers, "save")
    want_none_lost(layers, "save")
    for layer in layers:
        learned = layer.rule is not None and (layer.rule.scales != "rule" or layer.rule.range != "dynamic")
        if layer.kind == "experts" or layer.stage == "converted" or learned:
            raise StageError(
                f"cannot save parts of {layer.path}: experts, learned scales, static ranges and converted layers are saved "
                "whole; call whole = qkit.gather(model) in every process, and convert and save in the one that gets it"
            )
    if not any(layer.rule for layer in layers):
        raise StageError("no layer of this model is prepared: call prepare(model, recipe) before you train it")
    return [replace(layer, path=layer.name) for layer in layers]


def _plain(model: nn.Module, layers: list[Layer]) -> dict[str, Tensor]:
    """The tensors that are not weights on a grid, by their first names in files."""
    on_grid = {id(layer.module.weight) for layer in layers if layer.rule}
    first: dict[int, str] = {}
    state = surgery.state(model)
    for name, tensor in state.items():
        if id(tensor) not in on_grid:
            first.setdefault(id(tensor), name)
    return {name.replace(CHECKPOINT, ""): state[name] for name in first.values()}


def _slots(layer: Layer) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Names, types and shapes of the arrays of a weight on its grid."""
    grid: Grid = layer.module.weight_grid
    integer = grid.element.kind == "integer"
    whole = tuple(layer.module.weight.shape)
    scales = grid.scale_shape(whole)
    slots: list[tuple[str, Any, tuple[int, ...]]] = [
        ("codes", np.int8 if integer and grid.symmetric else np.uint8, whole),
        ("scales", np.float32 if integer else np.uint8, scales),
    ]
    slots += [("zeros", np.uint8, scales)] if grid.has_zeros else []
    return [*slots, ("tensor_scale", np.float32, ())] if grid.has_tensor_scale else slots


def _write_weight(engine: Any, layer: Layer, parts: Path, *, first: bool) -> bool:
    """Writes this process' part of a weight: its codes, scales and zero points. False if it is not finite."""
    outer, grid = layer.module.weight, layer.module.weight_grid
    fused = [other.weight for other in layer.module.fused if shares(other.rule.weight)] if shares(grid) else []
    if is_shard(outer):
        spread.want_groups_whole(_local(outer), outer, grid)
        q = spread.quantize(_local(outer), outer, grid, partners=[(_local(one), one) for one in fused])
    elif first:
        peak = max(engine.magnitude(one) for one in (outer, *fused)) if fused else None
        q = engine.quantize(outer.detach(), grid, peak=peak)
    else:
        q = None
    if q is None:
        return True
    if not bool(_local(outer).isfinite().all()):
        return False
    place = _place(outer)
    for name, _, shape in _slots(layer):
        array = engine.to_numpy(q.parts()[name])
        if name == "codes":
            _write(parts, f"{layer.path}.{name}", shape, array, place)
        elif name == "tensor_scale" or grid.group == "tensor":
            _write(parts, f"{layer.path}.{name}", shape, array.reshape(shape), ...)
        else:
            width = outer.shape[-1] // shape[-1]
            columns = slice(place[-1].start // width, -(-place[-1].stop // width)) if place is not ... else slice(None)
            rows = place[0] if place is not ... else slice(None)
            _write(parts, f"{layer.path}.{name}", shape, array, (rows, columns))
    return True


def _read(layer: Layer, parts: Path) -> QTensor[NDArray[Any]]:
    """The whole weight, mapped."""
    found = {name: _map(parts, f"{layer.path}.{name}", dtype, shape, "r") for name, dtype, shape in _slots(layer)}
    return QTensor(**found, grid=layer.module.weight_grid, dtype=dtype_of(layer.module.weight))


def _laid(parts: Path, name: str, array: NDArray[Any]) -> Any:
    """`array` in a file, so that memory has one weight at a time."""
    _write(parts, f"{name}.laid", array.shape, array, ..., mode="w+")
    return _map(parts, f"{name}.laid", array.dtype, array.shape, "r")


def _write(
    parts: Path, name: str, shape: tuple[int, ...], array: NDArray[Any], place: Any, *, mode: Any = "r+"
) -> None:
    if array.size:
        mapped = _map(parts, name, array.dtype, shape, mode)
        mapped[place] = array
        mapped.flush()


def _map(parts: Path, name: str, dtype: Any, shape: tuple[int, ...], mode: Any) -> Any:
    """The array `name`, mapped; one without elements has no file."""
    if 0 in shape:
        return np.empty(shape, dtype)
    mapped = np.memmap(parts / name, dtype, mode, shape=shape or (1,))
    return mapped if shape else mapped.reshape(())


def _dtype(tensor: Tensor) -> Any:
    name = str(tensor.dtype).rpartition(".")[2]
    return np.dtype(getattr(ml_dtypes, name, name))


def _local(tensor: Tensor) -> Tensor:
    return (local_part(tensor) if is_shard(tensor) else tensor).detach()


def _place(tensor: Tensor) -> Any:
    return place_of(tensor) if is_shard(tensor) else ...
