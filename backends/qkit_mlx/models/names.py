"""Names of tensors: those of transformers, and those that mlx-lm's `sanitize` makes of them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from qkit.engines.layer import Layer
from qkit.experts import file_name, member_of, module_name, paths_of
from qkit_mlx.layers import latent
from qkit_mlx.models.groups import config_of

Arrays = Mapping[str, mx.array]

HALF = re.compile(rf"(.*?)\b(?:{latent.KEYS}|{latent.VALUES})\.weight")
#: Biases of experts, by model type: the outputs of gate and up stand in turn.
JOINED_BIASES = ("gpt_oss",)
BIAS = re.compile(r"(.*\.experts)\.(gate_proj|up_proj|down_proj)\.bias")


def joined(arrays: Arrays, model: Any) -> dict[str, mx.array]:
    """`arrays` of the model, those that mlx-lm split as one tensor again, under the name that transformers has for it."""
    out: dict[str, mx.array] = {}
    biases = config_of(model).get("model_type") in JOINED_BIASES
    for name, array in arrays.items():
        if half := HALF.fullmatch(name):
            keys, values = (arrays.get(f"{half[1]}{one}.weight") for one in (latent.KEYS, latent.VALUES))
            if keys is not None and values is not None:
                both = mx.concatenate([keys.swapaxes(-1, -2), values], axis=1)
                out[f"{half[1]}{latent.NAME}.weight"] = both.reshape(-1, both.shape[-1])
                continue
        if biases and (bias := BIAS.fullmatch(name)):
            if bias[2] == "down_proj":
                out[f"{bias[1]}.down_proj_bias"] = array
            elif bias[2] == "gate_proj":
                both = mx.stack([array, arrays[f"{bias[1]}.up_proj.bias"]], axis=-1)
                out[f"{bias[1]}.gate_up_proj_bias"] = both.reshape(len(array), -1)
            continue
        out[name] = array
    return out


def split_names(joined: Collection[str], stored: Arrays) -> set[str]:
    """The names of the model's own arrays for those in `joined`."""
    out = set()
    for name in joined:
        path, found, _ = name.rpartition(f"{latent.NAME}.weight")
        halves = {f"{path}{one}.weight" for one in (latent.KEYS, latent.VALUES)}
        out |= halves if found and halves <= stored.keys() else {name}
    return out


def split(arrays: Arrays, stored: Arrays) -> dict[str, mx.array]:
    """The inverse of `joined`, for a model with the arrays `stored`."""
    out: dict[str, mx.array] = {}
    for name, array in arrays.items():
        path, found, _ = name.rpartition(f"{latent.NAME}.weight")
        halves = [f"{path}{one}.weight" for one in (latent.KEYS, latent.VALUES)]
        if found and all(half in stored for half in halves):
            heads, inner, nope = stored[halves[0]].shape
            each = array.reshape(heads, -1, inner)
            out[halves[0]] = mx.contiguous(each[:, :nope].swapaxes(-1, -2))
            out[halves[1]] = mx.contiguous(each[:, nope:])
        elif name.endswith(".experts.gate_up_proj_bias"):
            place = name.removesuffix("gate_up_proj_bias")
            out[f"{place}gate_proj.bias"], out[f"{place}up_proj.bias"] = array[:, ::2], array[:, 1::2]
        elif name.endswith(".experts.down_proj_bias"):
            out[f"{name.removesuffix('_bias')}.bias"] = array
        else:
            out[name] = array
    return out


def sanitized(arrays: Arrays, model: Any, blocks: Mapping[str, Layer]) -> dict[str, mx.array]:
    """`arrays` under the model's own names, by its `sanitize`, which translates those of files.

    Some models translate all of their tensors only where experts are among them, one by one. Placeholders stand for those that
    are quantized, or stacked already.

    Args:
        blocks: the blocks of experts by path.
    """
    config = config_of(model)
    known = {name for block in blocks.values() for name in block.stored}
    stacks = {name: array for name, array in arrays.items() if name in known}
    rest = {file_name(name, config): array for name, array in arrays.items() if name not in known}
    for name in list(rest):
        member = member_of(name, tuple(rest[name].shape), config)
        block = blocks.get(module_name(f"{member.block}.", config)[:-1]) if member and member.expert is None else None
        if member and block:
            stacked = rest.pop(name)
            for projection, own in zip(block.projections, block.stored, strict=True):
                if projection in member.projections:
                    each = [member.matrix(stacked, expert, projection) for expert in range(member.count)]  # type: ignore[arg-type]
                    stacks[own] = mx.stack(each)  # type: ignore[arg-type]  # a matrix is a slice of whatever array
    paths = (path for block in blocks.values() for path in paths_of(block.path, block.projections, config).values())
    absent = {f"{path}.weight": mx.zeros((1, 1)) for path in paths if f"{path}.weight" not in rest}
    made = model.sanitize(split({**rest, **absent}, {}))
    return {name: array for name, array in made.items() if name not in known and name not in absent} | stacks
