"""The content of a directory of weights, from headers and tensor scales alone: layers, grids, sizes, and what servers do."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qkit.artifact.config import read_config
from qkit.artifact.families import layer_of, tied_head
from qkit.artifact.foreign import open_any
from qkit.artifact.metadata import KEY, StoredRule, fit_of, read_rules
from qkit.artifact.servers import sentences
from qkit.engines.layer import Layer
from qkit.errors import ArtifactError, GridError
from qkit.experts import Member
from qkit.formats import compressed_tensors
from qkit.fused import shares
from qkit.qtensor import DTYPES as FLOATS
from qkit.sources.source import Source
from qkit.storage.layout import DTYPES
from qkit.storage.read import AXES, NUMBERS, Stored, read_folder
from qkit.storage.seal import check_seal


@dataclass(frozen=True, slots=True)
class Group:
    """The layers that one rule was applied to.

    Attributes:
        stored: the rule, the type of its weights, and the paths of its layers.
        format: compressed-tensors' name for the layout.
        numbers: how many numbers its weights have.
        nbytes: bytes of its codes and scales.
    """

    stored: StoredRule
    format: str
    numbers: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ForeignGroup:
    """Weights that another program stores in one way.

    Attributes:
        form: text for it, such as `GPTQ, 4 bits, groups of 128`.
        kind: kind of the layers.
        paths: of the layers; in a stack of experts, the name of the tensor.
        numbers: how many numbers the weights have.
        nbytes: bytes of their codes, scales and zero points.
    """

    form: str
    kind: str
    paths: tuple[str, ...]
    numbers: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a directory.

    Attributes:
        groups: the quantized layers, by rule.
        left_alone: paths of the float layers.
        tied: path of the embedding that is also the output head; empty where there is none.
        files: bytes of each weights file, by name.
        tensors: number of stored tensors.
        numbers: numbers of all tensors; a quantized weight counts with the numbers of its float weight.
        nbytes: bytes of all tensors.
        served: how vLLM's arithmetic differs from qkit's, and why it does not open the directory; a sentence each.
        fit: how codes were chosen: `method`, and of `solve` its settings and the digest of its statistics; None: by the rule.
        foreign: weights that another program quantized, by the way in which it stores them.
    """

    groups: tuple[Group, ...]
    left_alone: tuple[str, ...]
    tied: str
    files: Mapping[str, int]
    tensors: int
    numbers: int
    nbytes: int
    served: tuple[str, ...] = ()
    fit: Mapping[str, Any] | None = None
    foreign: tuple[ForeignGroup, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per number, over all tensors."""
        return 8 * self.nbytes / max(self.numbers, 1)


def inspect_directory(folder: Path) -> Inspection:
    """The content of `folder`: an artifact, a float model, or one that another program quantized.

    Raises:
        ArtifactError: the directory is unsound, or another program quantized the model in a way that qkit does not read.
    """
    tensors, metadata = read_folder(folder)
    check_seal(folder, tensors, digests=False)
    config = read_config(folder)
    if KEY not in metadata and (source := open_any(folder, tensors, config)).encoded:
        return _inspect_foreign(source, tensors)
    groups, taken, by_path = [], set(), parts(tensors)
    scales: dict[str, float] = {}
    for rule in read_rules(folder, metadata, config):
        assert rule.rule.weight is not None
        form, numbers, nbytes = compressed_tensors.form_of(rule.rule), 0, 0
        for path in rule.paths:
            mine = by_path.get(path, {})
            try:
                shape = check_parts(mine, rule, path=path)
            except (ArtifactError, GridError) as error:
                raise ArtifactError(f"{folder}: {path}: {error}") from None
            form = compressed_tensors.stored_form(mine, rule.rule.weight)
            options: dict[str, Any] = {"dtype": rule.dtype, "shape": shape, "form": form, "kind": scale_kind(mine)}
            names = compressed_tensors.contents(rule.rule.weight, **options)
            numbers += prod(shape)
            nbytes += sum(mine[name].slot.nbytes for name in names)
            taken |= {mine[name].slot.name for name in names}
            if shares(rule.rule.weight):
                scales[path] = float(compressed_tensors.read_tensor_scale(mine["weight_global_scale"].read()))
        groups.append(Group(rule, form, numbers, nbytes))
    rest = [stored.slot for name, stored in tensors.items() if name not in taken]
    found = [layer_of(slot, config or {}) for slot in rest]
    layers = [layer for layer in found if isinstance(layer, Layer)]
    blocks = {one.block for one in found if isinstance(one, Member)}
    quantized = [Layer(path, group.stored.rule.kind, (), None) for group in groups for path in group.stored.paths]
    owner = tied_head([*layers, *quantized], config) if config else None
    return Inspection(
        groups=tuple(groups),
        left_alone=tuple(sorted(blocks | {layer.path for layer in layers})),
        tied=owner.path if owner else "",
        files=_files(tensors),
        tensors=len(tensors),
        numbers=sum(prod(slot.shape) for slot in rest) + sum(group.numbers for group in groups),
        nbytes=sum(stored.slot.nbytes for stored in tensors.values()),
        served=tuple(sentences([group.stored for group in groups], tied=owner is not None, tensor_scales=scales)),
        fit=fit_of(metadata),
    )


def _inspect_foreign(source: Source, tensors: Mapping[str, Stored]) -> Inspection:
    """The content of a directory that another program quantized."""
    config, names, mine = source.detected.config or {}, defaultdict(list), source.encoded
    for name, stored in mine.items():
        found = layer_of(stored.slot, config)
        kind = found.kind if isinstance(found, Layer) else "experts" if isinstance(found, Member) else "other"
        names[stored.form.name, kind].append(name)
    groups = tuple(
        ForeignGroup(
            form,
            kind,
            tuple(name.removesuffix(".weight") for name in some),
            sum(prod(mine[name].slot.shape) for name in some),
            sum(mine[name].nbytes for name in some),
        )
        for (form, kind), some in names.items()
    )
    rest = [stored.slot for name, stored in source.tensors.items() if name not in mine]
    every = [layer_of(stored.slot, config) for stored in source.tensors.values()]
    owner = tied_head([one for one in every if isinstance(one, Layer)], config) if config else None
    layers = [layer for slot in rest if isinstance(layer := layer_of(slot, config), Layer)]
    return Inspection(
        groups=(),
        left_alone=tuple(sorted(layer.path for layer in layers)),
        tied=owner.path if owner else "",
        files=_files(tensors),
        tensors=len(tensors),
        numbers=sum(prod(stored.slot.shape) for stored in source.tensors.values()),
        nbytes=sum(stored.slot.nbytes for stored in tensors.values()),
        foreign=groups,
    )


def _files(tensors: Mapping[str, Stored]) -> dict[str, int]:
    """Bytes of each weights file, by name."""
    return dict(sorted({stored.file.name: stored.file.stat().st_size for stored in tensors.values()}.items()))


def parts(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """The tensors of every layer, by the layer's path and by their names in it."""
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        path, _, last = name.rpartition(".")
        found.setdefault(path, {})[last] = stored
    return found


def check_parts(found: Mapping[str, Stored], stored: StoredRule, *, path: str) -> tuple[int, ...]:
    """Shape of the weight of the layer at `path`, after a check of its stored parts. Reads headers and the stored shape.

    Raises:
        ArtifactError: a part is missing, or has another type or shape than the rule needs.
        GridError: the weight does not divide into groups.
    """
    grid, shape = stored.rule.weight, weight_shape(found, path=path)
    assert grid is not None
    form = compressed_tensors.stored_form(found, grid)
    want = compressed_tensors.contents(grid, dtype=stored.dtype, shape=shape, form=form, kind=scale_kind(found))
    for name, (kind, full) in want.items():
        if name not in found:
            raise ArtifactError(f"{name} is missing: quantize it again, or fetch it again")
        slot = found[name].slot
        if (DTYPES[slot.dtype][0], slot.shape) != (kind, full):
            raise ArtifactError(f"{name} is {slot.dtype} {list(slot.shape)}, where {grid} has {kind} {list(full)}")
    return shape


def scale_kind(found: Mapping[str, Stored]) -> str:
    """NumPy's name of the type of the scales among the stored parts of a weight, if they are floats."""
    kind = DTYPES[found["weight_scale"].slot.dtype][0] if "weight_scale" in found else ""
    return kind if kind in FLOATS else ""


def weight_shape(found: Mapping[str, Stored], *, path: str) -> tuple[int, ...]:
    """Shape of a layer's weight, from its stored parts.

    Raises:
        ArtifactError: the part with the shape is missing, or is not the shape of a matrix.
    """
    if "weight_shape" in found:
        shape = tuple(int(n) for n in found["weight_shape"].read().reshape(-1)[: AXES + 1])
        if len(shape) != 2 or not all(0 < n < NUMBERS for n in shape):
            raise ArtifactError(f"weight_shape says {list(shape)}: want two numbers above 0")
        return shape
    if "weight" in found and len(found["weight"].slot.shape) == 2:
        return found["weight"].slot.shape
    if "weight_packed" in found and len(found["weight_packed"].slot.shape) == 2:  # fp4: two codes in a byte
        *rows, n = found["weight_packed"].slot.shape
        return (*rows, 2 * n)
    raise ArtifactError(f"{path}: its codes are missing: quantize or save the model again")
