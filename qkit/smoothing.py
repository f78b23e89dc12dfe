"""`smooth`: a float model of the same function whose layers get inputs of more even size, for recipes that quantize inputs.

SmoothQuant (https://arxiv.org/abs/2211.10438): input j of the layers behind a norm is divided by s_j in the norm, and multiplied
in their weights, s_j = x_j^a / w_j^(1 - a), where x_j is the root mean square of the input, since statistics have that, and w_j
the largest weight. Each s_j is rounded to a power of two: then no number of the model is rounded, and its function is the same
bit for bit. A norm that multiplies by 1 + weight is the exception: its weight is rounded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.companions import companions
from qkit.artifact.config import read_config
from qkit.errors import PlanError, RangeError
from qkit.fitting.statistics import Statistics
from qkit.storage.arrays import array_stream
from qkit.storage.read import Stored, map_tensors, read_folder
from qkit.storage.write import write_directory
from qkit.streaming.carry_out import check_apart

MOST = 12  #: the largest exponent of a power of two, and the least below zero

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm in each block, and the layers that read it alone.

    Attributes:
        name: of the norm inside the block.
        readers: names of these layers; all of them are there, or the norm is left as it is.
        offset: the number that is added to its weight.
    """

    name: str
    readers: tuple[str, ...]
    offset: float = 0.0


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATED = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = (Norm("input_layernorm", QKV), Norm("post_attention_layernorm", GATED))
GEMMA = (Norm("input_layernorm", QKV, 1.0), Norm("post_attention_layernorm", GATED, 1.0))
GEMMA_2 = (Norm("input_layernorm", QKV, 1.0), Norm("pre_feedforward_layernorm", GATED, 1.0))
OPT = (Norm("self_attn_layer_norm", QKV), Norm("final_layer_norm", ("fc1",)))
PHI_3 = (Norm("input_layernorm", ("self_attn.qkv_proj",)), Norm("post_attention_layernorm", ("mlp.gate_up_proj",)))
NEOX = (
    Norm("input_layernorm", ("attention.query_key_value",)),
    Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
#: By type of the model. Of a mixture of experts, the norm before a router stays as it is: its readers are other ones.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), LLAMA),
    "phi3": PHI_3,
    "gpt_neox": NEOX,
    "gemma": GEMMA,
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA_2),
    "opt": OPT,
}


@dataclass(frozen=True, slots=True)
class Smoothed:
    """The powers of two of one norm.

    Attributes:
        norm: path of the norm.
        readers: paths of the layers.
        offset: see `Norm`.
        exponents: of the powers of two [inputs] that divide the inputs.
    """

    norm: str
    readers: tuple[str, ...]
    offset: float
    exponents: NDArray[np.int32]


def smooth(folder: Path, out: Path, statistics: Statistics, *, strength: float) -> tuple[Smoothed, ...]:
    """Writes the smoothed model of the float model in `folder` to `out`, whole or not at all; returns the powers of two.

    Args:
        strength: the exponent a, from 0 to 1: of how much of the spread of inputs moves to the weights.

    Raises:
        PlanError: the strength is outside; the family is not known; the statistics miss a layer, or are of quantized inputs; or
            a norm of 1 + weight is not in float32.
        ArtifactError: the statistics are of another model; or see `write_directory`.
        RangeError: a number would leave the range of its type.
    """
    if not 0 <= strength <= 1:
        raise PlanError(f"a strength of {strength:g} is outside 0 to 1: take 0.5")
    check_apart(out, folder)
    config = read_config(folder) or {}
    norms = _norms(config)
    stored, metadata = read_folder(folder)
    statistics.check_model(stored, folder)
    found = _find(norms, stored, statistics, strength)
    changes = {f"{one.norm}.{part}": (one, part) for one in found for part in ("weight", "bias")}
    changes |= {f"{path}.weight": (one, "reader") for one in found for path in one.readers}
    streams = []
    for name, array in map_tensors(stored).items():
        stream = array_stream(name, array)
        streams.append(replace(stream, blocks=_blocks(name, array, *changes[name])) if name in changes else stream)
    write_directory(out, streams, metadata=metadata, files=companions(folder, config=config))
    return found


def _norms(config: Mapping[str, Any]) -> tuple[Norm, ...]:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES or not config.get("do_layer_norm_before", True):
        raise PlanError(
            f"cannot smooth a {kind!r}: its norms and their readers are not known; known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _find(
    norms: tuple[Norm, ...], stored: Mapping[str, Stored], statistics: Statistics, strength: float
) -> tuple[Smoothed, ...]:
    """The norms of a model that can be smoothed, with their powers of two."""
    found = []
    for norm in norms:
        ending = f".{norm.name}.weight"
        for block in (name.removesuffix(ending) for name in stored if name.endswith(ending)):
            readers = tuple(f"{block}.{name}" for name in norm.readers)
            if not all(f"{path}.weight" in stored for path in readers):
                continue  # as of a mixture of experts
            at = f"{block}.{norm.name}"
            if norm.offset and stored[f"{at}.weight"].slot.dtype != "F32":
                raise PlanError(
                    f"{at}: its weight is added to 1, and would be rounded in {stored[f'{at}.weight'].slot.dtype}: save the "
                    "model in float32 first"
                )
            exponents = _exponents([stored[f"{path}.weight"] for path in readers], readers, statistics, strength)
            found.append(Smoothed(at, readers, norm.offset, exponents))
    return tuple(found)


def _exponents(
    weights: list[Stored], paths: tuple[str, ...], statistics: Statistics, strength: float
) -> NDArray[np.int32]:
    """Exponents of the powers of two next to s, less their mean; zero for inputs or weights of zeros."""
    for path in paths:
        if not statistics.has(path):
            raise PlanError(f"{statistics.folder} has no statistics of {path}: calibrate the whole model")
        if statistics.activation(path) is not None or statistics.grid(path) is not None:
            raise PlanError(
                f"{path}: statistics are of quantized inputs, or correct drift: calibrate without --recipe and --drift"
            )
    squares = statistics.moments(paths[0]).diagonal().astype(np.float64)
    largest = np.max([np.abs(one.mapped().astype(np.float64)).max(axis=0) for one in weights], axis=0)
    known = (squares > 0) & (largest > 0)
    if not known.any():
        return np.zeros(len(squares), np.int32)
    wanted = np.zeros(len(squares))
    wanted[known] = strength * np.log2(squares[known]) / 2 - (1 - strength) * np.log2(largest[known])
    wanted[known] -= wanted[known].mean()
    return np.clip(np.rint(wanted), -MOST, MOST).astype(np.int32)


def _blocks(name: str, array: Array, one: Smoothed, part: str) -> Callable[[], list[memoryview]]:
    """The bytes of a scaled tensor, which is computed when it is written."""
    return lambda: [np.ascontiguousarray(_scaled(name, array, one, part)).reshape(-1).view(np.uint8).data]


def _scaled(name: str, array: Array, one: Smoothed, part: str) -> Array:
    """A tensor of the norm, divided; or the weight [outputs, inputs] of a reader, multiplied.

    Raises:
        RangeError: a number would be rounded.
    """
    down = -one.exponents
    x = array.astype(np.float32)
    if part == "weight" and one.offset:
        return np.asarray(np.ldexp(x.astype(np.float64) + one.offset, down) - one.offset, np.float32)
    shift = one.exponents if part == "reader" else down
    found: Array = np.ldexp(x, shift).astype(array.dtype)
    if not (np.ldexp(found.astype(np.float32), -shift) == x).all():
        raise RangeError(f"{name}: a power of two takes a number out of the range of {array.dtype}: smooth in float32")
    return found


def summary(found: tuple[Smoothed, ...]) -> dict[str, Any]:
    """The norms with the least and the greatest power of two of each, by path."""
    return {one.norm: [float(np.exp2(end(one.exponents))) for end in (np.min, np.max)] for one in found}
