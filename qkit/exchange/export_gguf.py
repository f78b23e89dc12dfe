"""A whole model as one GGUF file: tensor names, model numbers, and the order of rotary rows. The only module that imports gguf.

Read off gguf 0.19 (`tensor_mapping.py`, `gguf_writer.py`) and transformers 5.23 (`integrations/ggml.py`,
`modeling_gguf_pytorch_utils.py`). The one computed value is 1 + w of Gemma's norms, and it has to be exact.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.config import CONFIG, describing
from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError, BackendError
from qkit.formats import gguf as gguf_layout
from qkit.formats.gguf_config import Architecture, architecture_of, head_width, numbers_of
from qkit.formats.packed import join
from qkit.installation import how_to_install
from qkit.storage.batches import batches, in_threads
from qkit.storage.destination import check_file
from qkit.storage.staging import whole_file
from qkit.storage.tensor_writer import write_all

NUMBERS: Final = 1 << 20  #: numbers of a weight that are converted together
FLOATS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  #: GGUF's types, by NumPy's


def export_gguf(source: Snapshot, out: str | Path) -> None:
    """Writes `source` as the GGUF file `out`, which appears when it is whole. The file has no tokenizer: see `_describe`.

    Raises:
        BackendError: gguf is not installed.
        LockedError: another process writes `out`.
        PlanError: its disk is read-only; see `check_file`.
        ArtifactError: `out` exists; GGUF has no such model, or no type for a grid; or a number is not exact in its type.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise BackendError(f"GGUF files need the gguf package: {how_to_install('gguf')}") from None
    check_file(out)
    config = source.config or {}
    with describing(source.folder / CONFIG):
        architecture = architecture_of(config)
        numbers = numbers_of(config, architecture)
    index = next(i for i, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(index, numbers["block_count"])
    tensors: dict[str, _Tensor] = {}
    for name in sorted({*source.tensors, *(join(path, "weight") for path in source.weights)}):
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ArtifactError(f"{name}: GGUF has no name for it in a {architecture.name!r}: export --to dense")
        tensors[theirs] = _tensor(source, name, architecture)
    with whole_file(out) as aside:
        writer: Any = gguf.GGUFWriter(aside, architecture.name)
        try:
            _describe(writer, numbers, architecture)
            _write(writer, tensors)
        except BaseException:
            with suppress(OSError):  # it would write the rest to a full disk, and fail as before
                writer.close()
            raise
        writer.close()


def _write(writer: Any, tensors: Mapping[str, "_Tensor"]) -> None:
    """Writes the whole file: the header, then every tensor block by block, on all cores."""
    import gguf

    for theirs, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(theirs, tensor.shape, np.dtype(np.float32), _nbytes(tensor), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.flush()
    begins = list(accumulate((_padded(writer, tensor) for tensor in tensors.values()), initial=file.tell()))
    os.truncate(file.fileno(), begins.pop())  # padding is zeros

    def write(batch: Sequence[tuple[int, "_Tensor"]]) -> None:
        for begin, tensor in batch:
            for block in tensor.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                write_all(file.fileno(), data, begin)
                begin += len(data)

    in_threads(write, batches(zip(begins, tensors.values(), strict=True), lambda one: _nbytes(one[1])))
    writer.flush()


def _nbytes(tensor: "_Tensor") -> int:
    import gguf

    many, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return int(prod(tensor.shape) // many * nbytes)


def _padded(writer: Any, tensor: "_Tensor") -> int:
    """Bytes of a tensor and of the padding after it."""
    return int(writer.ggml_pad(_nbytes(tensor), writer.data_alignment))


def _describe(writer: Any, numbers: Mapping[str, Any], architecture: Architecture) -> None:
    """Writes the model's numbers. States no tokenizer, since GGUF knows tokenizers only by a list of names."""
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_quantization_version(2)
    for name, value in numbers.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture.name}.{name}", value)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: GGUF's type, the shape, and a function that returns its bytes, in blocks."""

    kind: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[NDArray[Any]]]


def _tensor(source: Snapshot, name: str, architecture: Architecture) -> _Tensor:
    weight, config = source.weights.get(name.removesuffix(".weight")), source.config or {}
    rows = (weight or source.tensors[name]).shape[:1]
    order = _order(name, config, rows) if architecture.interleaved else None
    if weight is not None:
        assert weight.rule.weight is not None
        try:
            return _Tensor(
                gguf_layout.layout(weight.rule.weight, weight.shape[-1]), weight.shape, _blocks(name, weight, order)
            )
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


def _blocks(
    name: str, weight: StoredWeight, order: NDArray[np.int64] | None
) -> Callable[[], Iterable[NDArray[np.uint8]]]:
    def blocks() -> Iterable[NDArray[np.uint8]]:
        try:
            packed = weight.read()
            for block in (packed if order is None else packed.permuted(order)).blocks(NUMBERS):
                yield gguf_layout.store(block)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None

    return blocks


def _order(name: str, config: Mapping[str, Any], rows: tuple[int, ...]) -> NDArray[np.int64] | None:
    """The new order of the `rows` of queries or keys, for llama.cpp's rotary embedding: halves of each head in turn.

    None for any other weight.

    Raises:
        ArtifactError: the number of rows is not that of the configuration's heads.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count, head = heads.get(name.split(".")[-2]), head_width(config)
    if count is None:
        return None
    if rows != (count * head,) or head % 2:
        raise ArtifactError(f"{name} has {list(rows)} rows, and config.json has {count} heads of {head}: mend it")
    return np.arange(count * head).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
