"""Names of tensors: those of transformers, and those of mlx-lm's models, which split, turn and shift some of them."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qkit.engines.layer import Layer
from qkit.errors import ArtifactError
from qkit.experts import file_name, member_of, module_name, paths_of
from qkit.formats.mlx_config import from_mlx_name, to_mlx_name
from qkit.formats.mlx_families import FAMILIES, Family
from qkit_mlx.layers import latent

Arrays = Mapping[str, mx.array]

HALF = re.compile(rf"(.*?)\b{latent.KEYS}\.weight")
BIAS = re.compile(r"(.*\.experts)\.(gate_proj|down_proj)\.bias")
CONVOLUTION = re.compile(r".*\bconv(?:1d)?\.weight")
#: Names of norms that count from one in mlx-lm and from zero in transformers, in families that `shifts`.
SHIFTED = re.compile(r".*(?:\.(?:input_layernorm|post_attention_layernorm|q_norm|k_norm)|model\.norm)\.weight")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, and the arrays of the model that hold it.

    Attributes:
        name: in transformers.
        own: names in the model.
        join: the tensor that these arrays hold.
        split: the arrays for such a tensor.
    """

    name: str
    own: tuple[str, ...]
    join: Callable[[Sequence[mx.array]], mx.array] = lambda arrays: arrays[0]
    split: Callable[[mx.array], Sequence[mx.array]] = lambda array: [array]


def config_of(model: Any) -> dict[str, Any]:
    """The type of the model, under the key of a configuration; {} where it has none."""
    arguments = getattr(model, "args", None)
    kind = getattr(arguments, "model_type", None) or getattr(model, "model_type", None)
    return {"model_type": kind} if isinstance(kind, str) else {}


def outward(path: str, model: Any) -> str:
    """The path in transformers of the module at `path` in the model."""
    for pattern, text in _family(model).modules:
        path = re.sub(pattern, text, path)
    return path


def joined(stored: Arrays, model: Any) -> dict[str, mx.array]:
    """The arrays `stored` of the model as the tensors of a file."""
    return {entry.name: entry.join([stored[name] for name in entry.own]) for entry in _entries(stored, model)}


def split_names(names: Collection[str], stored: Arrays, model: Any) -> set[str]:
    """The names in the model of the tensors `names` of a file."""
    return {own for entry in _entries(stored, model) if entry.name in names for own in entry.own} | set(names)


def translated(
    arrays: Arrays, stored: Arrays, model: Any, blocks: Mapping[str, Layer], without: Collection[str]
) -> Arrays:
    """The tensors `arrays` of a file under the model's own names, with the values that it has.

    Args:
        blocks: the blocks of experts by path.
        without: the names of tensors that are not there.

    Raises:
        ArtifactError: mlx-lm ignores one that is not zero.
    """
    entries = _entries(stored, model)
    wanted = {
        entry.name: entry.join([stored[own] for own in entry.own]).shape
        for entry in entries
        if entry.name not in without
    }
    if {name: array.shape for name, array in arrays.items()} == wanted:
        known = [entry for entry in entries if entry.name in arrays]
        return {own: a for entry in known for own, a in zip(entry.own, entry.split(arrays[entry.name]), strict=True)}
    if not hasattr(model, "sanitize"):
        return arrays
    ends = _family(model).ignored
    own = {name: array for name, array in arrays.items() if ends and name.endswith(ends) and name in stored}
    return _sanitized({name: a for name, a in arrays.items() if name not in own}, model, blocks) | own


def _sanitized(arrays: Arrays, model: Any, blocks: Mapping[str, Layer]) -> dict[str, mx.array]:
    """`arrays` under the model's own names, by its `sanitize`, which translates those of files.

    Some models translate all of their tensors only where experts are among them, one by one. Placeholders stand for those that
    are quantized, or stacked already.
    """
    config = config_of(model)
    known = {name for block in blocks.values() for name in block.stored}
    stacks = {name: array for name, array in arrays.items() if name in known}
    rest = {to_mlx_name(file_name(name, config), config): array for name, array in arrays.items() if name not in known}
    for name, array in rest.items():
        if name.endswith(_family(model).ignored) and mx.any(array):
            raise ArtifactError(f"mlx-lm ignores {name}, whose numbers choose experts: use another engine")
    for name in list(rest):
        member = member_of(name, tuple(rest[name].shape), config)
        place = from_mlx_name(f"{member.block}.", config) if member and member.expert is None else ""
        block = blocks.get(module_name(place, config)[:-1])
        if member and block:
            stacked = rest.pop(name)
            for projection, own in zip(block.projections, block.stored, strict=True):
                if projection in member.projections:
                    each = [member.matrix(stacked, expert, projection) for expert in range(member.count)]  # type: ignore[arg-type]
                    stacks[own] = mx.stack(each)  # type: ignore[arg-type]  # a matrix is a slice of whatever array
    head = "language_model.lm_head.weight"  # qwen3_vl_moe's wants one, whether it is there or quantized
    absent = {head: mx.zeros((1, 1))} if config.get("model_type") == "qwen3_vl_moe" and head not in rest else {}
    dropped: set[str] = set()
    for block in blocks.values():
        paths = paths_of(block.path, block.projections, config).values()
        names = [to_mlx_name(f"{path}.weight", config) for path in paths]
        if not any(name in rest for name in names):
            absent.update({name: mx.zeros((1, 1)) for name in names})
            dropped |= set(block.stored)
    made = model.sanitize({**_split_biases(rest), **absent})
    return {name: array for name, array in made.items() if name not in dropped and name not in absent} | stacks


def _entries(stored: Arrays, model: Any) -> list[Entry]:
    """Every tensor of a file, in the order of the model's arrays."""
    family, out = _family(model), []
    for name, array in stored.items():
        if (half := HALF.fullmatch(name)) and (values := f"{half[1]}{latent.VALUES}.weight") in stored:
            out.append(_halves(f"{half[1]}{latent.NAME}.weight", (name, values), array.shape))
        elif family.biases and (bias := BIAS.fullmatch(name)):
            out.append(_bias(bias[1], bias[2]))
        elif not _is_second(name, stored, family):
            out.append(_alone(outward(name, model), name, array, family, model))
    return out


def _is_second(name: str, stored: Arrays, family: Family) -> bool:
    """Whether the array is part of the entry of another."""
    path, found, _ = name.rpartition(f"{latent.VALUES}.weight")
    of_values = bool(found) and f"{path}{latent.KEYS}.weight" in stored
    return of_values or (family.biases and name.endswith(".experts.up_proj.bias"))


def _halves(name: str, own: tuple[str, str], shape: tuple[int, ...]) -> Entry:
    heads, inner, nope = shape

    def join(arrays: Sequence[mx.array]) -> mx.array:
        both = mx.concatenate([arrays[0].swapaxes(-1, -2), arrays[1]], axis=1)
        return both.reshape(-1, inner)

    def split(array: mx.array) -> Sequence[mx.array]:
        each = array.reshape(heads, -1, inner)
        return [mx.contiguous(each[:, :nope].swapaxes(-1, -2)), mx.contiguous(each[:, nope:])]

    return Entry(name, own, join, split)


def _bias(block: str, projection: str) -> Entry:
    """Biases of experts, of which files have those of gate and up in turn."""
    if projection == "down_proj":
        return Entry(f"{block}.down_proj_bias", (f"{block}.down_proj.bias",))
    own = (f"{block}.gate_proj.bias", f"{block}.up_proj.bias")
    return Entry(
        f"{block}.gate_up_proj_bias",
        own,
        lambda arrays: mx.stack(list(arrays), axis=-1).reshape(len(arrays[0]), -1),
        lambda array: [array[:, ::2], array[:, 1::2]],
    )


def _split_biases(arrays: Arrays) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    for name, array in arrays.items():
        block, _, end = name.rpartition(".")
        projection = {"gate_up_proj_bias": "gate_proj", "down_proj_bias": "down_proj"}.get(end)
        entry = _bias(block, projection) if projection and block.endswith(".experts") else Entry(name, (name,))
        out.update(zip(entry.own, entry.split(array), strict=True))
    return out


def _alone(name: str, own: str, array: mx.array, family: Family, model: Any) -> Entry:
    if not hasattr(model, "sanitize"):
        return Entry(name, (own,))
    if CONVOLUTION.fullmatch(own) and array.ndim == 3 and array.shape[-1] == 1:
        return Entry(name, (own,), lambda arrays: arrays[0].moveaxis(1, 2), lambda array: [array.moveaxis(2, 1)])
    if family.shifts and SHIFTED.fullmatch(own):
        return Entry(name, (own,), lambda arrays: arrays[0] - 1, lambda array: [array + 1])  # exact, from half on
    return Entry(name, (own,))


def _family(model: Any) -> Family:
    return FAMILIES.get(str(config_of(model).get("model_type")), Family())
