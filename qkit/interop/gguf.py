"""GGUF files, which llama.cpp and transformers open: blocks of 32 numbers with their scale, names, and what a model is like.

Read off gguf 0.19 (`quants.py`, `tensor_mapping.py`, `gguf_writer.py`) and transformers 5.23 (`integrations/ggml.py`,
`modeling_gguf_pytorch_utils.py`). Codes are moved within their block; nothing is computed but float16 scales, which have to
be exact, and 1 + w of Gemma's norms, which has to be too. The only module that imports gguf.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit import packing
from qkit.artifact.config import describing
from qkit.artifact.directory import CONFIG
from qkit.checkpoint import swap
from qkit.errors import ArtifactError, BackendError
from qkit.grid import Grid
from qkit.interop.mlx_lm import spread
from qkit.interop.packed import unpack
from qkit.interop.rope import rope_type, ropes
from qkit.interop.snapshot import Held, Snapshot, join
from qkit.packing import Packed

BLOCK: Final = 32
NUMBERS: Final = 1 << 20  #: that are decoded together
TYPES: Final = {"int4": "Q4_0", "int8": "Q8_0", "e2m1": "MXFP4"}  #: by element
LOCAL_THETA: Final = 10000.0  #: of the rope of sliding attention, which GGUF has no word for
MOST: Final = 1 << 32  #: GGUF's counts are smaller
FLOATS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What GGUF makes of a type of model.

    Attributes:
        name: its own.
        activation: the only one it computes.
        interleaved: whether the rows of queries and keys are in the order of complex pairs.
        norms_plus_one: whether norms hold 1 + w.
        keys: further numbers of a configuration, by GGUF's name less the architecture's.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norms_plus_one: bool = False
    keys: tuple[tuple[str, str], ...] = ()


_GEMMA = (("attention.sliding_window", "sliding_window"),)
ARCHITECTURES: Final = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture(
        "gemma2",
        activation="gelu_pytorch_tanh",
        norms_plus_one=True,
        keys=(
            *_GEMMA,
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
    ),
    "gemma3_text": Architecture("gemma3", activation="gelu_pytorch_tanh", norms_plus_one=True, keys=_GEMMA),
}

#: Numbers of a configuration by GGUF's name, less the architecture's; every architecture has them.
COUNTS: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def layout(grid: Grid, inputs: int) -> str:
    """The GGUF type that holds rows of `inputs` numbers on `grid`; longer groups repeat their scale.

    Raises:
        ArtifactError: there is none.
    """
    group = grid.group if isinstance(grid.group, int) else inputs
    if grid.element.name not in TYPES or not grid.symmetric or grid.scale == "nvfp4" or group % BLOCK:
        raise ArtifactError(
            f"GGUF holds no rows of {inputs} on {grid}: it holds int4 and int8 without zero points, and e2m1 under E8M0 scales, "
            f"in groups that {BLOCK} divides; export --to dense"
        )
    return TYPES[grid.element.name]


def store(packed: Packed) -> NDArray[np.uint8]:
    """`packed` as rows of blocks, uint8 [outputs, bytes]: each block its scale, then its codes, the halves in a byte's nibbles.

    Raises:
        ArtifactError: GGUF has no such type, or a scale is no float16.
    """
    rows, inputs = packed.shape
    kind = layout(packed.grid, inputs)
    scales = packed.scales
    if kind != "MXFP4":
        with np.errstate(over="ignore"):
            scales = packed.scales.astype(np.float16)
        lost = int(np.count_nonzero(scales.astype(np.float32) != packed.scales))
        if lost:
            raise ArtifactError(f"{lost} of {scales.size} scales are no float16, which {kind} holds: export --to dense")
    head = np.ascontiguousarray(spread(scales, rows, inputs // BLOCK))[..., None].view(np.uint8)
    codes = unpack(packed).codes.reshape(rows, -1, BLOCK)
    body: NDArray[Any] = codes.view(np.uint8)
    if kind != "Q8_0":
        nibbles = codes if kind == "MXFP4" else packing.unsigned(codes, packed.grid.element)
        body = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    return np.concatenate([head, body], axis=-1).reshape(rows, -1)


def export_gguf(source: Snapshot, out: str | Path) -> None:
    """Writes `source` as the GGUF file `out`, which appears when it is whole. Without a tokenizer: see `_describe`.

    Raises:
        BackendError: gguf is not installed.
        LockedError: another process writes `out`.
        ArtifactError: `out` exists; GGUF has no such model or no type for a grid, or a number does not go into it exactly.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise BackendError("GGUF files need the gguf package: pip install 'qkit[gguf]'") from None
    out = Path(out)
    if out.exists():
        raise ArtifactError(f"{out} exists: remove it, or choose another name")
    config = source.config or {}
    with describing(source.folder / CONFIG):
        architecture = _architecture(config)
        numbers = _numbers(config, architecture)
    index = next(i for i, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(index, numbers["block_count"])
    tensors: dict[str, _Tensor] = {}
    for name in sorted({*source.tensors, *(join(path, "weight") for path in source.weights)}):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ArtifactError(f"{name}: GGUF has no name for it in a {architecture.name!r}: export --to dense")
        tensors[theirs] = _tensor(source, name, architecture)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    lock = swap.lock(aside)
    writer: Any = gguf.GGUFWriter(aside, architecture.name)
    try:
        _describe(writer, numbers, architecture)
        for theirs, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[tensor.kind]
            many, nbytes = gguf.GGML_QUANT_SIZES[kind]
            total = prod(tensor.shape) // many * nbytes
            writer.add_tensor_info(theirs, tensor.shape, np.dtype(np.float32), total, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for tensor in tensors.values():
            writer.write_padding(file, file.tell())  # what `write_tensor_data` does, but block by block
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        writer.write_padding(file, file.tell())
        writer.flush()
        os.fsync(file.fileno())
        writer.close()
        os.replace(aside, out)
        swap.sync_folder(out.parent)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
        os.close(lock)


def _architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model, if GGUF's computes the same."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ArtifactError(
            f"how GGUF writes a {kind!r} is not known to this qkit: known are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    scaled = [rope_type(rope) for rope in ropes(config).values() if rope_type(rope) != "default"]
    window = config.get("sliding_window") if architecture.name == "llama" or config.get("use_sliding_window") else None
    scalar = config.get("query_pre_attn_scalar", _head(config))
    local = ropes(config).get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    for wrong, what in (
        (scalar != _head(config), f"query_pre_attn_scalar {scalar}, which is not its head_dim"),
        (local != LOCAL_THETA, f"a rope of theta {local} for sliding attention"),
        (activation != architecture.activation, f"hidden_act {activation!r}"),
        (bool(scaled), f"a rope of type {scaled[0] if scaled else None!r}"),
        (window is not None, f"a sliding window of {window}"),
    ):
        if wrong:
            raise ArtifactError(
                f"a {kind!r} with {what} is not one that qkit can say in GGUF: export --to mlx or --to dense"
            )
    return architecture


def _numbers(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The model's numbers, by GGUF's names less the architecture's.

    Raises:
        ArtifactError: one is none that GGUF holds.
        KeyError: one is missing.
    """
    head = _head(config)
    values = {
        **{name: config[key] for name, key in COUNTS.items()},
        **{name: config[key] for name, key in architecture.keys if config.get(key) is not None},
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(_rope(config).get("rope_theta") or config.get("rope_theta", 10000.0)),
    }
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < MOST:
            raise ArtifactError(
                f"config.json: {value!r:.200} is no {name} of GGUF: want a number from 0 to {MOST - 1:,}"
            )
    return values


def _describe(writer: Any, numbers: Mapping[str, Any], architecture: Architecture) -> None:
    """The model's numbers. Its tokenizer is said to be none: GGUF tells tokenizers apart by a list of names of known ones."""
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_quantization_version(2)
    for name, value in numbers.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture.name}.{name}", value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of full attention, which is the one that GGUF says."""
    found = ropes(config)
    return found.get("full_attention") or next(iter(found.values()), {})


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: GGUF's type, the shape, and a function that makes its bytes, in blocks."""

    kind: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[NDArray[Any]]]


def _tensor(source: Snapshot, name: str, architecture: Architecture) -> _Tensor:
    held, config = source.weights.get(name.removesuffix(".weight")), source.config or {}
    rows = (held or source.tensors[name]).shape[:1]
    order = _order(name, config, rows) if architecture.interleaved else None
    if held is not None:
        assert held.rule.weight is not None
        try:
            return _Tensor(layout(held.rule.weight, held.shape[-1]), held.shape, _blocks(name, held, order))
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None
    array = source.tensors[name]
    if array.dtype.name not in FLOATS:
        raise ArtifactError(f"{name} is {array.dtype.name}: qkit puts {', '.join(FLOATS)} into GGUF")
    if array.ndim > 1:
        return _Tensor(FLOATS[array.dtype.name], array.shape, lambda: [array if order is None else array[order]])
    vector = array.astype(np.float32)  # GGUF's programs want norms and biases in float32
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        vector = vector + np.float32(1)
        lost = int(np.count_nonzero(vector - np.float32(1) != array.astype(np.float32)))
        if lost:
            raise ArtifactError(
                f"{name}: GGUF holds 1 + w, and {lost} of {vector.size} are no float32: export --to dense"
            )
    return _Tensor("F32", array.shape, lambda: [vector if order is None else vector[order]])


def _blocks(name: str, held: Held, order: NDArray[np.int64] | None) -> Callable[[], Iterable[NDArray[np.uint8]]]:
    def blocks() -> Iterable[NDArray[np.uint8]]:
        try:
            packed = held.read()
            for block in (packed if order is None else packed.permuted(order)).blocks(NUMBERS):
                yield store(block)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None

    return blocks


def _order(name: str, config: Mapping[str, Any], rows: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Which of the `rows` of queries or keys goes where: halves of each head in turn, for llama.cpp's rotary embedding."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count, head = heads.get(name.split(".")[-2]), _head(config)
    if count is None:
        return None
    if rows != (count * head,) or head % 2:
        raise ArtifactError(f"{name} has {list(rows)} rows, and config.json speaks of {count} heads of {head}: mend it")
    return np.arange(count * head).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)


def _head(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
