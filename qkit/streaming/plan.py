"""The plan of a recipe for a checkpoint: every tensor of the output, to the byte, from headers alone."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

from qkit import fused, native
from qkit.artifact.companions import companions, left_behind
from qkit.artifact.config import CONFIG, quantized_config, read_config
from qkit.artifact.families import HEAD, check_whole, experts_layers, layer_of, output_name, tied_head
from qkit.artifact.foreign import open_any
from qkit.artifact.metadata import KEY, describe, group_paths, layout_of, read_rules, stored_rule
from qkit.engines.layer import Layer
from qkit.errors import ArtifactError, GridError, PlanError, RecipeError
from qkit.experts import Member
from qkit.fitting.fits import Fit, check_fit
from qkit.formats import compressed_tensors
from qkit.formats.packed import join
from qkit.formats.row_blocks import row_blocks
from qkit.planning import Planned, plan, warn_of_rest
from qkit.qtensor import DType
from qkit.rules import Recipe, Rule
from qkit.sources.encoded import Encoded
from qkit.storage.layout import DTYPES, INDEX, SHARD_BYTES, TYPE_NAMES, Layout, Slot, lay_out
from qkit.storage.read import MissingError, Stored, inside, read_folder
from qkit.storage.write import Output
from qkit.streaming.caveats import Caveat, caveats
from qkit.streaming.copies import tied_copies
from qkit.streaming.untie import untied

OUT_PROJ = "out_proj.weight"
COPY = "a copy"  #: how the reason begins for a tensor that the output does not have
#: Anonymous memory in bytes, measured on Linux: of Python with NumPy; of a worker; of each element in its block.
BASE, WORKER, ELEMENT = 45_000_000, 16_000_000, 16 if native.available() else 40
#: The same, of each element that another program's codes are decoded to: the code, and float32 numbers beside it.
DECODED = 56
#: The same, of each tensor of the source and of the output: names, places, digests. Workers copy some of these pages.
SOURCE, OUTPUT = 700, 2_000


@dataclass(frozen=True, slots=True)
class Row:
    """The plan for one tensor of the source.

    Attributes:
        stored: the tensor in the source.
        path: path of the layer whose weight it is, or of the block of experts; empty for any other tensor.
        kind: kind of that layer; empty for any other tensor.
        rule: rule of that layer; None where the tensor is copied.
        reason: reason for the copy.
        slots: tensors of the output: a copy, perhaps under another name, or the parts of the quantized weights.
        member: its place among the experts of a block; None for other tensors.
        fused: the weights in the source that share a tensor scale, this one among them; empty where it shares none.
    """

    stored: Stored
    path: str
    kind: str
    rule: Rule | None
    reason: str
    slots: tuple[Slot, ...]
    member: Member | None = None
    fused: tuple[Stored, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a weight: of one expert's projection where the tensor has several."""
        return self.member.shape if self.member else self.stored.slot.shape

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths in files of the weights in the tensor: that of a layer, or those of experts."""
        return tuple(self.member.paths.values()) if self.member else (self.path,)

    @property
    def dtype(self) -> DType:
        """The type of a weight, by NumPy's name."""
        return cast(DType, DTYPES[self.stored.slot.dtype][0])


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for a whole checkpoint: its tensors in order, and the directory to write.

    Attributes:
        folder: the source.
        rows: one row for each stored tensor, sorted by name, with numbers in names sorted as numbers.
        tied: path of the embedding that is also the output head; empty where the head has its own weight.
        layout: the weights files of the output.
        files: other files of the output; see `Output`.
        left_behind: names of entries of the source that the output will not have.
        caveats: readers that will not open the output, or only in one way.
        notes: sentences about a source that another program quantized; see `Source.notes`.
        fit: how codes are chosen; None: by the rule of their grid.
        by_search: paths of layers that have no statistics, where others have.
    """

    folder: Path
    rows: tuple[Row, ...]
    tied: str
    layout: Layout
    files: Mapping[str, bytes | Path]
    left_behind: tuple[str, ...]
    caveats: tuple[Caveat, ...] = ()
    notes: tuple[str, ...] = ()
    fit: Fit | None = None
    by_search: tuple[str, ...] = ()

    def output(self, folder: Path, *, fingerprint: str = "") -> Output:
        """The directory to write."""
        return Output(folder, self.layout, files=self.files, fingerprint=fingerprint)

    @property
    def output_bytes(self) -> int:
        """Bytes of all files of the output. Computes them anew."""
        return self.output(self.folder).nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors of the output per number in the source."""
        numbers = sum(prod(row.stored.slot.shape) for row in self.rows)
        return 8 * sum(slot.nbytes for row in self.rows for slot in row.slots) / max(numbers, 1)

    def peak_memory(self, workers: int) -> int:
        """An upper estimate of the NumPy engine's anonymous memory with this number of workers, in bytes."""
        blocks = [next(row_blocks(row.shape)) for row in self.rows if row.rule]
        widths = [row.shape[1] for row in self.rows if row.rule]
        largest = max(((end - begin) * n for (begin, end), n in zip(blocks, widths, strict=True)), default=0)
        element = ELEMENT + (DECODED if any(isinstance(row.stored, Encoded) for row in self.rows) else 0)
        tensors = SOURCE * len(self.rows) + OUTPUT * len(self.layout.places)
        return BASE + tensors + workers * (WORKER + element * largest)


def make_plan(
    folder: Path,
    recipe: Recipe,
    *,
    shard_bytes: int = SHARD_BYTES,
    copy_code: bool = False,
    untie: bool = False,
    fit: Fit | None = None,
) -> Plan:
    """The plan of `recipe` for the model in `folder`. Reads headers and JSON, and no tensor.

    Args:
        copy_code: whether the output gets the Python files of the source too.
        untie: whether the output gets a weight for a tied output head, equal to the embedding.
        fit: how codes are chosen; None: by the rule of their grid.

    Raises:
        ArtifactError: a file is unsound or hostile, or the model is quantized by qkit, or in a way that qkit does not read.
        PlanError: the recipe does not fit the model, or a part of the model is missing.
    """
    try:
        stored, metadata = read_folder(folder)
    except MissingError as error:
        raise PlanError(str(error)) from None
    config = read_config(folder)
    if KEY in metadata and read_rules(folder, metadata, config, layout=layout_of(metadata)):
        raise ArtifactError(f"{folder} is quantized already, by qkit: name the float model")
    source = open_any(folder, stored, config)
    tensors, config = dict(source.tensors), source.detected.config
    if untie:
        tensors, config = untied(tensors, config, folder)
    known = config or {}
    check_whole(tensors, known)
    found = {name: _layer(tensors[name].slot, known, tensors) for name in sorted(tensors, key=_natural)}
    members = {name: (tensors[name].slot, one) for name, one in found.items() if isinstance(one, Member)}
    blocks = experts_layers(members)
    layers = [layer for layer in found.values() if isinstance(layer, Layer)]
    copies = tied_copies(tensors, layers, known)
    found.update((name, f"{COPY} of {owner}, which is stored once") for name, owner in copies.items())
    layers = [layer for layer in found.values() if isinstance(layer, Layer)]
    owner = tied_head(layers, known)
    others = [
        Layer(name, "other", tensors[name].slot.shape, None, obstacle=one)
        for name, one in found.items()
        if isinstance(one, str)
    ]
    every = [*_with_head(layers, owner), *blocks.values(), *others]
    planned = {item.layer.path: item for item in _plan(every, recipe)}
    rows = []
    for name, one in found.items():
        layer = blocks[one.block] if isinstance(one, Member) else one
        item = planned[layer.path] if isinstance(layer, Layer) else None
        rule, reason = (item.rule, item.reason) if item else (None, str(layer))
        path, kind = (layer.path, layer.kind) if isinstance(layer, Layer) else ("", "")
        member = one if isinstance(one, Member) else None
        row = Row(tensors[name], path, kind, rule, reason, (), member)
        rows.append(row if name in copies else replace(row, slots=_slots(row, known)))
    _check_names(rows, folder)
    warn_of_rest(map(_planned, rows), recipe)
    rows = _with_fused(rows)
    rules = group_paths((stored_rule(row.rule), row.dtype, path) for row in rows if row.rule for path in row.paths)
    left_alone = [path for path, item in planned.items() if _keeps_weight(item)]
    left_alone += [path for row in rows if (path := _matrix(row))]
    single = any(row.member and row.member.expert is not None and not row.rule for row in rows)
    written_config = quantized_config(config, rules, left_alone=left_alone, single_experts=single)
    files = companions(folder, config=written_config)
    if copy_code:
        files.update((file.name, inside(folder, file.name)) for file in folder.glob("*.py"))
    used = {one.file.name for one in stored.values()} | {INDEX, CONFIG, *files}
    tied = owner.path if owner else ""
    written = (slot for row in rows for slot in row.slots)
    by_search = check_fit(fit, [(row.rule, row.paths) for row in rows if row.rule], stored, folder)
    text = describe(rules, fit=fit.describe() if fit else None)
    layout = lay_out(written, metadata={KEY: text}, shard_bytes=shard_bytes)
    found_caveats = caveats(config, rules, tied=bool(tied), single_experts=single)
    behind = left_behind(folder, used)
    return Plan(folder, tuple(rows), tied, layout, files, behind, found_caveats, source.notes, fit, by_search)


def _layer(slot: Slot, config: Mapping[str, Any], names: Collection[str]) -> Layer | Member | str:
    if slot.name.endswith(OUT_PROJ) and f"{slot.name.removesuffix(OUT_PROJ)}in_proj_weight" in names:
        return "nn.MultiheadAttention reads it itself"
    return layer_of(replace(slot, name=output_name(slot.name, config)), config)


def _planned(row: Row) -> Planned:
    """A row, as `warn_of_rest` wants it; of a tensor with one axis, without a number."""
    shape = row.stored.slot.shape if len(row.stored.slot.shape) > 1 else (0,)
    kind: Any = row.kind or "other"
    return Planned(Layer(row.path or row.stored.slot.name, kind, shape, None), row.rule, row.reason)


def _with_head(layers: list[Layer], owner: Layer | None) -> list[Layer]:
    """The layers of the model, with the output head that shares the weight of the embedding `owner`."""
    if owner is None:
        return layers
    head = Layer(HEAD, "linear", owner.shape, None, tied=owner.path)
    return [*layers, head]


def _plan(layers: list[Layer], recipe: Recipe) -> list[Planned]:
    try:
        planned = plan(layers, recipe)
    except (RecipeError, GridError) as error:
        raise PlanError(str(error)) from None
    for item in planned:
        if item.rule and item.rule.range != "dynamic":
            raise PlanError(
                f"{item.layer.path}: the recipe's range is {item.rule.range!r}, so that its scales come from data, which "
                "runs through a model: build it, and use qkit.prepare, qkit.convert and qkit.save"
            )
    return planned


def _with_fused(rows: list[Row]) -> list[Row]:
    sharing = {row.paths[0]: row for row in rows if row.rule and fused.shares(row.rule.weight) and not _is_stack(row)}
    together = {path: tuple(sharing[one].stored for one in group) for group in fused.groups(sharing) for path in group}
    return [row if _is_stack(row) else replace(row, fused=together.get(row.paths[0], ())) for row in rows]


def _is_stack(row: Row) -> bool:
    """Whether the tensor has the weights of all experts of a block."""
    return row.member is not None and row.member.expert is None


def _keeps_weight(item: Planned) -> bool:
    """Whether this linear layer has no codes of its own in the output."""
    return item.layer.kind == "linear" and (item.rule is None or bool(item.layer.tied))


def _matrix(row: Row) -> str:
    """The path of a module whose matrix is copied and that is no layer, such as a router: for readers it may be one."""
    path, _, last = row.stored.slot.name.rpartition(".")
    return path if not row.kind and last == "weight" and len(row.stored.slot.shape) == 2 else ""


def _slots(row: Row, config: Mapping[str, Any]) -> tuple[Slot, ...]:
    slot, rule = row.stored.slot, row.rule
    if rule is None or rule.weight is None:
        return (replace(slot, name=output_name(slot.name, config)),)
    try:
        form = compressed_tensors.form_of(rule)
        parts = compressed_tensors.contents(rule.weight, dtype=row.dtype, shape=row.shape, form=form)
    except ArtifactError as error:
        raise PlanError(f"{row.path}: {error}") from None
    for name, array in compressed_tensors.server_tensors(rule).items():
        parts[name] = (array.dtype.name, array.shape)
    return tuple(
        Slot(join(path, name), TYPE_NAMES[kind], shape) for path in row.paths for name, (kind, shape) in parts.items()
    )


def _check_names(rows: Iterable[Row], folder: Path) -> None:
    seen = set()
    for row in rows:
        for slot in row.slots:
            if slot.name in seen:
                raise ArtifactError(f"{folder}: two tensors would be called {slot.name}: drop {row.stored.slot.name}")
            seen.add(slot.name)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
