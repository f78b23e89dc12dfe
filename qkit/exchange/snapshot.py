"""What a model directory holds, whatever its layout: quantized weights by path, every other tensor by name. All mapped."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.directory import read_config
from qkit.artifact.metadata import KEY, entries_of
from qkit.errors import ArtifactError, GridError
from qkit.formats import compressed_config, compressed_tensors, mlx_config, mlx_lm
from qkit.formats.packed import Tensors
from qkit.formats.settings import QUANTIZATION, check_alike, quantization_of
from qkit.intake import parse_json
from qkit.qtensor import DTYPES, DType
from qkit.reference.packing import Packed
from qkit.rules import Kind, Rule
from qkit.storage import read as source
from qkit.storage.arrays import read_folder
from qkit.storage.seal import check_seal
from qkit.streaming.families import EMBEDDINGS

CHUNK = 1 << 24  #: bytes that are looked at together
FOREIGN = "; qkit holds a model exactly or not at all: open it with what wrote it, or quantize the float model"
LAYOUTS: dict[str, Any] = {"compressed-tensors": compressed_tensors, "mlx": mlx_lm}


@dataclass(frozen=True, slots=True)
class Held:
    """A quantized weight in a directory: what it is, and how to get it.

    Attributes:
        rule: its grids; those of a layer's inputs and outputs too.
        dtype, shape: as in `Packed`.
        read: gives it, codes as views of the mapped file; raises `ArtifactError` where the tensors are not sound.
        unknown: what else the layer quantizes, by a rule that is none of qkit's.
    """

    rule: Rule
    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Packed]
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of a directory.

    Attributes:
        folder: where it is.
        layout: `compressed-tensors`, `mlx`, or `float` where nothing is quantized.
        foreign: whether another tool than qkit quantized it.
        config: `config.json` as transformers has it, without a word on quantization; None where there is none.
        weights: by the path of their layer.
        tensors: the others, by name.
    """

    folder: Path
    layout: str
    foreign: bool
    config: dict[str, Any] | None
    weights: dict[str, Held]
    tensors: Tensors

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        names = {*self.weights, *(name.removesuffix(".weight") for name in self.tensors)}
        headless = not any(name.rpartition(".")[2] in ("lm_head", "embed_out", "output") for name in names)
        return bool((self.config or {}).get("tie_word_embeddings", headless))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's logical content, by its float name; the same in every layout that holds the same.

        Of a quantized weight that is: shape, dtype, element, groups, kind of scale and zero point, canonical words, scales.
        Of any other: shape, dtype, bytes. Not the name of the scale rule, which decoding does not ask for.
        """
        out = {join(path, "weight"): _digest_packed(held.read()) for path, held in self.weights.items()}
        return {**out, **{name: _digest_array(array) for name, array in self.tensors.items()}}

    def digest(self) -> str:
        """SHA-256 over all of `digests`."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests().items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read(folder: str | Path) -> Snapshot:
    """The content of `folder`: a model of qkit's, as saved or exported; of compressed-tensors; of mlx-lm; or a float one.

    Raises:
        ArtifactError: it is unsound, quantized in another way, or holds a quantized weight that is on none of qkit's grids; or
            qkit wrote it, and it is no longer what was written. Every byte is read once for that.
    """
    folder = Path(folder)
    stored, _ = source.read_folder(folder)
    check_seal(folder, stored, digests=True)
    return read_unsealed(folder)


def read_unsealed(folder: Path) -> Snapshot:
    """As `read`, without a look at the digests of `qkit.json`: for callers that compare them by themselves."""
    tensors, metadata = read_folder(folder)
    config = read_config(folder)
    known = config and {name: value for name, value in config.items() if name not in QUANTIZATION}
    if KEY in metadata:
        return _own(folder, tensors, metadata, config)
    with _place(folder):
        said = quantization_of(config)
        packed, mlx = (said[name] for name in QUANTIZATION)
        if mlx:
            check_alike(said)
    if mlx:
        return _mlx(folder, tensors, known or {}, mlx)
    if packed.get("quant_method") == "compressed-tensors":
        return _compressed(folder, tensors, known or {}, packed)
    if packed:
        method = packed.get("quant_method", "an unknown tool")
        raise ArtifactError(f"{folder} is quantized by {method}: qkit reads compressed-tensors' layout and mlx-lm's")
    return Snapshot(folder, "float", False, config, {}, tensors)


def join(path: str, name: str) -> str:
    """The name of a tensor of the layer at `path`, which is empty where the model is one layer."""
    return f"{path}.{name}" if path else name


def _own(folder: Path, tensors: Tensors, metadata: Mapping[str, str], said: dict[str, Any] | None) -> Snapshot:
    """What qkit wrote; its metadata says what it is, and its config.json may not say another thing."""
    layout = layout_of(metadata)
    entries = entries_of(folder, metadata, said, layout=layout)
    config = said and {name: value for name, value in said.items() if name not in QUANTIZATION}
    if layout == "mlx" and entries and said:
        with _place(folder):
            grids = {path: entry.rule.weight for entry in entries for path in entry.paths}
            mlx_config.check_told(said, grids, tensors)
    if layout == "mlx":
        added = set(map(str, _about(metadata).get("added") or ()))
        config = config and {name: value for name, value in config.items() if name not in added}
        tensors = {mlx_config.inward(name, config or {}): array for name, array in tensors.items()}
    weights = {}
    for entry in entries:
        if entry.rule.weight is None:
            raise ArtifactError(f"{folder}: the metadata have no grid for {', '.join(entry.paths)}: save it again")
        for path in entry.paths:
            mine = _take(tensors, path, layout)
            with _place(folder, path):
                shape = LAYOUTS[layout].shape_of(mine, entry.rule.weight)
            weights[path] = _held(folder, path, layout, mine, entry.rule, entry.dtype, shape)
    return Snapshot(folder, layout if weights else "float", False, config, weights, tensors)


def _compressed(folder: Path, tensors: Tensors, config: dict[str, Any], said: Mapping[str, Any]) -> Snapshot:
    """What another tool wrote in compressed-tensors' layout."""
    weights = {}
    with _place(folder):
        found = compressed_config.grids(said, tensors, kind_of=kind_of)
    for path, (grid, moving) in found.items():
        mine = _take(tensors, path, "compressed-tensors")
        with _place(folder, path):
            shape = compressed_tensors.shape_of(mine, grid)
            dtype = _dtype(mine["weight_scale"], config)
            stored = {**mine, "weight_scale": _widened(mine["weight_scale"], dtype)}
        rule = Rule(("*",), kind=kind_of(path), weight=grid)
        held = _held(folder, path, "compressed-tensors", stored, rule, dtype, shape, way_out=FOREIGN)
        weights[path] = replace(held, unknown="its inputs or outputs" if moving else "")
    return Snapshot(folder, "compressed-tensors", True, config, weights, tensors)


def _mlx(folder: Path, tensors: Tensors, config: dict[str, Any], said: Mapping[str, Any]) -> Snapshot:
    """What mlx-lm wrote: its own names, which are transformers' for most types of models."""
    kind = config.get("model_type")
    if kind not in mlx_config.SAME_NAMES:
        known = ", ".join(sorted(mlx_config.SAME_NAMES))
        raise ArtifactError(
            f"{folder}: how mlx-lm renames the tensors of a {kind!r} is not known to this qkit: known are {known}"
        )
    shapes = {
        name.removesuffix(".scales"): (tensors[name.removesuffix("scales") + "weight"].shape, tensors[name].shape)
        for name in tensors
        if name.endswith(".scales") and name.removesuffix("scales") + "weight" in tensors
    }
    weights = {}
    with _place(folder):
        found = mlx_config.containers(said, shapes)
    for path, (container, shape) in found.items():
        mine = _take(tensors, path, "mlx")
        with _place(folder, path):
            grid = mlx_lm.grid_of(mine, container)
            dtype = _dtype(mine["scales"], config)
        rule = Rule(("*",), kind=kind_of(path), weight=grid)
        weights[path] = _held(folder, path, "mlx", mine, rule, dtype, shape, way_out=FOREIGN)
    return Snapshot(folder, "mlx", True, config, weights, tensors)


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What qkit's metadata say; empty where they are not readable, which `entries_of` then says."""
    try:
        return dict(parse_json(metadata[KEY]))
    except (ValueError, TypeError):
        return {}


def layout_of(metadata: Mapping[str, str]) -> str:
    """In which layout qkit wrote a directory with these metadata: `compressed-tensors`, its own, or `mlx`, an export."""
    return "mlx" if KEY in metadata and _about(metadata).get("layout") == "mlx" else "compressed-tensors"


def kind_of(path: str) -> Kind:
    """Whether the quantized layer at `path` is an embedding or linear, by the names that transformers' models have."""
    return "embedding" if EMBEDDINGS.search(path.rpartition(".")[2]) else "linear"


def _held(
    folder: Path,
    path: str,
    layout: str,
    mine: Tensors,
    rule: Rule,
    dtype: DType,
    shape: tuple[int, ...],
    *,
    way_out: str = "",
) -> Held:
    grid = rule.weight
    assert grid is not None
    if len(shape) != 2:
        raise ArtifactError(f"{folder}: {path} is a weight of shape {list(shape)}: qkit holds those of single layers")

    def read() -> Packed:
        with _place(folder, path, way_out):
            packed: Packed = LAYOUTS[layout].restore(mine, grid=grid, dtype=dtype, shape=shape)
            return packed

    return Held(rule, dtype, shape, read)


def _take(tensors: Tensors, path: str, layout: str) -> Tensors:
    """The tensors of one weight, out of all."""
    names = [name for name in LAYOUTS[layout].NAMES if join(path, name) in tensors]
    return {name: tensors.pop(join(path, name)) for name in names}


def _dtype(scale: NDArray[Any], config: Mapping[str, Any]) -> DType:
    """What a weight was before: the type of its scales, or, where these are codes, of the model."""
    names = (scale.dtype.name, config.get("dtype"), config.get("torch_dtype"))
    found = next((dtype for name in names for dtype in DTYPES if name == dtype), None)
    if found is None:
        raise ArtifactError(
            "neither its scales nor config.json say of what type the weight was: add dtype to config.json"
        )
    return found


def _widened(scale: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """float16 scales as float32, where qkit holds those of a float16 model: exact."""
    return scale.astype(np.float32) if scale.dtype.name == dtype == "float16" else scale


@contextmanager
def _place(folder: Path, path: str = "", way_out: str = "") -> Iterator[None]:
    """Puts the folder, and the layer if there is one, around the message of what goes wrong inside."""
    where = f"{folder}: {path}" if path else str(folder)
    try:
        yield
    except KeyError as error:
        raise ArtifactError(f"{where}: {error.args[0]} is missing: fetch the directory again") from None
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{where}: {error}{way_out}") from None


def _digest_packed(packed: Packed) -> str:
    grid = packed.grid
    said = (packed.shape, packed.dtype, grid.element.name, packed.scales.shape, grid.symmetric, grid.scale == "nvfp4")
    found = hashlib.sha256(repr(said).encode())
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
