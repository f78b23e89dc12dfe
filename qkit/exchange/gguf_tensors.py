"""The tensors of a GGUF file: GGUF's type for each, and its bytes in blocks. Decides what falls back to float16."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError
from qkit.experts import is_router
from qkit.formats import gguf as gguf_layout
from qkit.formats.gguf import FLOATS
from qkit.formats.gguf_config import Architecture, head_width
from qkit.formats.mapped import gguf_blocks, gguf_kind, mapped
from qkit.formats.packed import unpack
from qkit.qtensor import QTensor
from qkit.reference import dequantize
from qkit.reference.packing import Packed

NUMBERS: Final = 1 << 20  #: numbers of a weight that are converted together


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write.

    Attributes:
        kind: GGUF's type.
        shape: its shape.
        blocks: returns its bytes, in blocks.
        scale: the number that multiplies all values, which GGUF stores as a tensor of its own; 1 where there is none.
        fallback: the reason why a quantized weight is stored as floats; empty for any other tensor.
    """

    kind: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[NDArray[Any]]]
    scale: float = 1.0
    fallback: str = ""


def weight_tensor(
    name: str,
    weight: StoredWeight,
    order: NDArray[np.int64] | None,
    architecture: Architecture,
    *,
    fallback: str | None,
) -> Tensor:
    """A quantized weight.

    Args:
        name: of the weight, for messages.
        order: the new order of its rows.
        architecture: that of the model.
        fallback: `f16` stores a weight that no type of GGUF holds as its values in float16; None refuses it.

    Raises:
        ArtifactError: no type of GGUF holds the weight, and there is no fallback.
    """
    assert weight.rule.weight is not None
    plain = mapped(weight.parts, grid=weight.rule.weight, dtype=weight.dtype, shape=weight.shape)
    if plain is not None and (found := gguf_kind(plain)):
        return Tensor(found, weight.shape, lambda: gguf_blocks(plain, order))
    reason = ""
    try:
        gguf_layout.layout(weight.rule.weight, weight.shape[-1])  # before anything is read
        packed = weight.read()
        kind = gguf_layout.kind_of(packed)
        scale = 1.0 if packed.tensor_scale is None else float(packed.tensor_scale)
        if scale != 1 and (lost := architecture.why_no_scale(weight.rule.kind)):
            raise ArtifactError(f"{lost}: {gguf_layout.WAY_OUT}")
    except ArtifactError as error:
        if fallback is None:
            raise ArtifactError(f"{name}: {error}") from None
        kind, scale, reason = "F16", 1.0, str(error).partition(": ")[0]

    def blocks() -> Iterable[NDArray[Any]]:
        try:
            packed, memory = weight.read(), np.empty(2 * max(NUMBERS, weight.shape[-1]), np.uint8)
            for block in packed.blocks(NUMBERS) if order is None else _permuted(packed, order):
                yield half_values(block) if reason else gguf_layout.store(block, kind, out=memory)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None

    return Tensor(kind, weight.shape, blocks, scale, reason)


def float_tensor(name: str, array: NDArray[Any], order: NDArray[np.int64] | None, architecture: Architecture) -> Tensor:
    """A tensor that is not quantized: a matrix in its own type, a vector in float32.

    Raises:
        ArtifactError: GGUF has no such type.
    """
    if array.dtype.name not in FLOATS:
        raise ArtifactError(f"{name} is {array.dtype.name}: qkit puts {', '.join(FLOATS)} into GGUF")
    if array.ndim > 1 and is_router(
        name.rpartition(".")[0]
    ):  # in bfloat16, llama.cpp rounds inputs, and chooses other experts
        return Tensor("F32", array.shape, lambda: [array.astype(np.float32)])
    if array.ndim > 1:
        return Tensor(
            FLOATS[array.dtype.name], array.shape, lambda: [array] if order is None else _rows(np.asarray(array), order)
        )
    vector = array.astype(np.float32)  # GGUF's programs want norms and biases in float32
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        vector = vector + np.float32(1)  # in float32, as transformers itself computes 1 + w
    return Tensor("F32", array.shape, lambda: [vector if order is None else vector[order]])


def rotary_order(
    name: str, rows: tuple[int, ...], config: Mapping[str, Any], architecture: Architecture
) -> NDArray[np.int64] | None:
    """The new order of the `rows` of queries or keys, for llama.cpp's rotary embedding: halves of each head in turn.

    None for any other weight.

    Raises:
        ArtifactError: the number of rows is not that of the configuration's heads.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count, head = heads.get(name.split(".")[-2] if "." in name else ""), head_width(config)
    if count is None or not architecture.interleaved:
        return None
    if rows != (count * head,) or head % 2:
        raise ArtifactError(f"{name} has {list(rows)} rows, and config.json has {count} heads of {head}: mend it")
    return np.arange(count * head).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)


def rows_of(source: Snapshot, name: str) -> tuple[int, ...]:
    """The first axis of the tensor or quantized weight of this name."""
    return (source.weights.get(name.removesuffix(".weight")) or source.tensors[name]).shape[:1]


def _permuted(packed: Packed, order: NDArray[np.int64]) -> Iterable[Packed]:
    step = max(NUMBERS // packed.shape[-1], 1)
    return (packed.permuted(order[start : start + step]) for start in range(0, len(order), step))


def _rows(array: NDArray[Any], order: NDArray[np.int64]) -> Iterable[NDArray[Any]]:
    step = max(NUMBERS // array.shape[-1], 1)
    return (array[order[start : start + step]] for start in range(0, len(order), step))


def half_values(packed: Packed) -> NDArray[np.float16]:
    """The values of a weight, each rounded to the nearest float16.

    Raises:
        ArtifactError: a value is larger than the largest float16.
    """
    q: QTensor[NDArray[Any]] = unpack(packed)
    values = dequantize(replace(q, dtype="float32"))
    with np.errstate(over="ignore"):
        halves: NDArray[np.float16] = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ArtifactError("its values are larger than the largest float16: export --to dense")
    return halves
