"""A snapshot: the content of a model directory, whatever its layout. Here is how one of qkit's own directories becomes one."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.config import read_config
from qkit.artifact.further import predicts_further
from qkit.artifact.known import based, missing_base
from qkit.artifact.metadata import about, fit_of, layout_of, read_rules
from qkit.artifact.mlx_experts import expert_parts, without_stacks
from qkit.errors import ArtifactError, GridError
from qkit.experts import expert_of
from qkit.formats import compressed_tensors, mlx_config, mlx_lm
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.packed import Tensors, join
from qkit.formats.settings import QUANTIZATION
from qkit.qtensor import DTYPES, DType
from qkit.reference.packing import Packed
from qkit.rules import Rule
from qkit.storage.known_digests import KnownDigests
from qkit.storage.read import Stored, map_tensors, read_folder

CHUNK = 1 << 24  #: bytes that one call digests
SCALES = ("weight_scale", "scales")  #: names of the scales of a weight, in either layout
LAYOUTS: dict[str, Any] = {"compressed-tensors": compressed_tensors, "mlx": mlx_lm}
#: Ends of the names of tensors that values are computed from. Codes and floats only change places.
COMPUTED = tuple(
    f".{name}" for one in LAYOUTS.values() for name in one.NAMES if name not in ("weight", "weight_packed")
)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A quantized weight in a directory, not read yet.

    Attributes:
        rule: grid of the weight, and those of the layer's inputs and outputs.
        dtype: type of the weight before it was quantized.
        shape: of the weight, [outputs, inputs].
        read: returns the packed weight, its codes as views of the mapped file. Raises `ArtifactError` where the tensors are
            not sound.
        unknown: text for messages, where the layer also quantizes inputs or outputs by a rule that qkit does not have.
        kind: NumPy's name of the type of its scales, if they are floats on a read grid.
        parts: its tensors as mapped, by the names of compressed-tensors; None where another layout has them. Nobody checked them.
    """

    rule: Rule
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Packed]
    unknown: str = ""
    kind: str = ""
    parts: Tensors | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of a model directory: quantized weights, and the other tensors. All tensors are mapped, none is copied.

    Attributes:
        folder: the directory.
        layout: `compressed-tensors`, `mlx`, or `float` where nothing is quantized.
        foreign: whether another tool than qkit quantized the model.
        config: `config.json` in transformers' names, without the quantization keys; None where there is no file.
        weights: quantized weights, by the path of their layer.
        tensors: all other tensors, by name.
        notes: sentences for the user about what was read, without their full stops.
        fit: how the codes were chosen, as its metadata say; None: by the rule of their grid, or nobody says.
        files: contents of files that belong beside the weights and do not lie in the directory, by name.
        sealed: the digests that the seal of the directory states of mapped tensors, where nobody has compared them yet.
    """

    folder: Path
    layout: str
    foreign: bool
    config: dict[str, Any] | None
    weights: dict[str, StoredWeight]
    tensors: Tensors
    sealed: KnownDigests | None = None
    notes: tuple[str, ...] = ()
    fit: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def of_the_model(self) -> "Snapshot":
        """The content under the names of a model with a head, without modules that predict further tokens; see `further`."""
        base = missing_base([*self.weights, *self.tensors], self.config)
        weights = {based(path, base): one for path, one in self.weights.items()}
        tensors = {based(name, base): one for name, one in self.tensors.items()}
        return replace(
            self,
            weights={path: one for path, one in weights.items() if not predicts_further(f"{path}.", self.config)},
            tensors={name: one for name, one in tensors.items() if not predicts_further(name, self.config)},
        )

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        names = {*self.weights, *(name.removesuffix(".weight") for name in self.tensors)}
        headless = not any(name.rpartition(".")[2] in ("lm_head", "embed_out", "output") for name in names)
        return bool((self.config or {}).get("tie_word_embeddings", headless))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's logical content, by its name in the float model; equal in every layout.

        The digest of a quantized weight covers shape, dtype, element, groups, kinds of scale and zero point, packed words and
        scales. The digest of another tensor covers shape, dtype and bytes. The name of the scale rule is left out, since
        decoding does not depend on it.
        """
        out = {join(path, "weight"): _digest_packed(weight.read()) for path, weight in self.weights.items()}
        return {**out, **{name: _digest_array(array) for name, array in self.tensors.items()}}

    def digest(self) -> str:
        """SHA-256 of all `digests` together."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests().items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_own(
    folder: Path,
    *,
    digests: Mapping[str, str] | None = None,
    headers: tuple[Mapping[str, Stored], Mapping[str, str]] | None = None,
) -> Snapshot:
    """The content of a directory that qkit wrote: an artifact, or an export for another program. Checks no digest.

    Args:
        digests: SHA-256 of tensors by name that the snapshot states as `sealed`.
        headers: what `read_folder` returned; None reads them here.

    Raises:
        ArtifactError: the metadata are not readable, `config.json` contradicts them, or a weight is not sound.
    """
    stored, metadata = headers or read_folder(folder)
    tensors = map_tensors(stored)
    sealed = KnownDigests(tensors, digests, stored, computed=COMPUTED) if digests else None
    config, layout = read_config(folder), layout_of(metadata)
    rules = read_rules(folder, metadata, config, layout=layout)
    known = config and {name: value for name, value in config.items() if name not in QUANTIZATION}
    if layout == "mlx" and rules and config:
        with locating(folder):
            grids = {path: one.rule.weight for one in rules for path in one.paths}
            mlx_config.check_export(config, grids, tensors)
    if layout == "mlx":
        if (family := FAMILIES.get(str((config or {}).get("model_type")))) and family.shifts:
            raise ArtifactError(
                f"{folder} is an export for mlx-lm of a model whose norms it changes: import the model that it was exported from"
            )
        added = set(map(str, about(metadata).get("added") or ()))
        replaced = about(metadata).get("replaced")
        before = replaced if isinstance(replaced, dict) else {}
        known = known and {name: before.get(name, value) for name, value in known.items() if name not in added}
        tensors = {mlx_config.from_mlx_name(name, known or {}): array for name, array in tensors.items()}
    paths = [path for one in rules for path in one.paths]
    mixed = {path for path in paths if layout == "mlx" and expert_of(path)}
    weights = {}
    for one in rules:
        if one.rule.weight is None:
            raise ArtifactError(f"{folder}: the metadata have no grid for {', '.join(one.paths)}: save it again")
        for path in one.paths:
            parts = expert_parts(tensors, path, known or {}) if path in mixed else take_parts(tensors, path, layout)
            with locating(folder, path):
                shape = LAYOUTS[layout].shape_of(parts, one.rule.weight)
            weights[path] = stored_weight(folder, path, layout, parts, rule=one.rule, dtype=one.dtype, shape=shape)
    if layout == "mlx":
        tensors = without_stacks(tensors, mixed, known or {})
    return Snapshot(
        folder, layout if weights else "float", False, known, weights, tensors, sealed, fit=fit_of(metadata)
    )


def stored_weight(
    folder: Path,
    path: str,
    layout: str,
    parts: Tensors,
    *,
    rule: Rule,
    dtype: DType,
    shape: tuple[int, ...],
    way_out: str = "",
) -> StoredWeight:
    """The weight of the layer at `path`, whose stored tensors are `parts` of `layout`.

    Args:
        way_out: end of the message where the parts are not sound.

    Raises:
        ArtifactError: the weight is no matrix.
    """
    grid = rule.weight
    assert grid is not None
    if len(shape) != 2:
        raise ArtifactError(f"{folder}: {path} is a weight of shape {list(shape)}: qkit holds those of single layers")

    def read() -> Packed:
        with locating(folder, path, way_out):
            packed: Packed = LAYOUTS[layout].restore(parts, grid=grid, dtype=dtype, shape=shape)
            return packed

    kinds = (parts[name].dtype.name for name in SCALES if grid.read and name in parts)
    mapped = parts if LAYOUTS[layout] is compressed_tensors else None
    return StoredWeight(
        rule, dtype, shape, read, kind=next((kind for kind in kinds if kind in DTYPES), ""), parts=mapped
    )


def take_parts(tensors: Tensors, path: str, layout: str) -> Tensors:
    """The stored tensors of the weight at `path`, by their names in `layout`. Removes them from `tensors`."""
    names = [name for name in LAYOUTS[layout].NAMES if join(path, name) in tensors]
    return {name: tensors.pop(join(path, name)) for name in names}


@contextmanager
def locating(folder: Path, path: str = "", way_out: str = "") -> Iterator[None]:
    """Names the folder, and the layer at `path`, in the message of an error that the block raises.

    Raises:
        ArtifactError: the block raised one, or a GridError or KeyError.
    """
    where = f"{folder}: {path}" if path else str(folder)
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"{where}: {error.args[0]} is missing: fetch the directory again") from None
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{where}: {error}{way_out}") from None


def _digest_packed(packed: Packed) -> str:
    grid = packed.grid
    properties = (
        packed.shape,
        packed.dtype,
        grid.element.name,
        packed.scales.shape,
        grid.symmetric,
        grid.has_tensor_scale,
        *((grid.scale, packed.scales.dtype.name) if grid.read else ()),
    )
    found = hashlib.sha256(repr(properties).encode())
    for name, array in packed.parts().items():
        found.update(name.encode())
        _update(found, array)
    return found.hexdigest()


def _digest_array(array: NDArray[Any]) -> str:
    found = hashlib.sha256(repr((array.shape, array.dtype.name)).encode())
    _update(found, array)
    return found.hexdigest()


def _update(found: Any, array: NDArray[Any]) -> None:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for begin in range(0, flat.size, CHUNK):
        found.update(flat[begin : begin + CHUNK].data)
