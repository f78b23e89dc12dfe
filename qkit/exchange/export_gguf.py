"""A whole model as one GGUF file: tensors, model numbers and the tokenizer. The only module that imports gguf.

Read off gguf 0.19 (`tensor_mapping.py`, `gguf_writer.py`) and transformers 5.23 (`integrations/ggml.py`,
`modeling_gguf_pytorch_utils.py`). The one computed value is 1 + w of Gemma's norms, in float32, as transformers computes it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.config import CONFIG, describing
from qkit.artifact.families import HEAD
from qkit.artifact.snapshot import COMPUTED, Snapshot
from qkit.errors import ArtifactError, BackendError
from qkit.exchange.gguf_stacks import is_expert, stack_tensors
from qkit.exchange.gguf_tensors import Tensor, float_tensor, rotary_order, rows_of, weight_tensor
from qkit.formats.gguf import FLOATS
from qkit.formats.gguf_config import Architecture, architecture_of, head_width, numbers_of
from qkit.formats.gguf_rope import rope_tables, with_ropes
from qkit.formats.gguf_tokenizer import Vocabulary
from qkit.formats.packed import join
from qkit.installation import how_to_install
from qkit.storage.batches import batches, in_threads
from qkit.storage.destination import check_file
from qkit.storage.staging import whole_file
from qkit.storage.swap import leave_to_system
from qkit.storage.tensor_writer import reserve, write_all

NO_TOKENIZER = "without a tokenizer: llama.cpp opens the file, and takes no text"
BLOCKS = 2  #: GGUF's version of the layouts of its blocks


@dataclass(frozen=True, slots=True)
class Written:
    """A GGUF file that was written.

    Attributes:
        kinds: how many quantized weights have each of GGUF's types.
        fallbacks: the reason for each quantized weight that is stored as float16, by its name.
        notes: for the reader: where llama.cpp differs from transformers, and which large tensors stay float.
    """

    kinds: Mapping[str, int]
    fallbacks: Mapping[str, str]
    notes: tuple[str, ...]


def export_gguf(
    source: Snapshot, out: str | Path, *, vocabulary: Vocabulary | None = None, fallback: str | None = None
) -> Written:
    """Writes `source` as the GGUF file `out`, which appears when it is whole.

    Args:
        vocabulary: the tokenizer, from `gguf_tokenizer.read_vocabulary`; without one, llama.cpp opens the file and takes no text.
        fallback: `f16` stores weights that no type of GGUF holds as their values in float16; None refuses such a model.

    Raises:
        BackendError: gguf is not installed.
        LockedError: another process writes `out`.
        PlanError: its disk is read-only; see `check_file`.
        ArtifactError: `out` exists; or GGUF has no such model, or no type for a grid.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise BackendError(f"GGUF files need the gguf package: {how_to_install('gguf')}") from None
    check_file(out)
    source = source.of_the_model()
    config = with_ropes(source.config or {})
    with describing(source.folder / CONFIG):
        architecture = architecture_of(config)
        numbers = numbers_of(config, architecture)
        tables = rope_tables(config, head_width(config))
    index = next(i for i, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(index, numbers["block_count"])
    tensors: dict[str, Tensor] = {}
    fallbacks: dict[str, str] = {}
    stacks = stack_tensors(source, config, fallback=fallback)
    single = {*source.tensors, *(join(path, "weight") for path in source.weights)}
    for name in sorted({*stacks, *(name for name in single if not is_expert(source, name, config))}):
        if architecture.tied and name == join(HEAD, "weight") and source.tied:
            continue  # llama.cpp takes the embedding
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ArtifactError(f"{name}: GGUF has no name for it in a {architecture.name!r}: export --to dense")
        tensors[theirs] = stacks.get(name) or _tensor(source, name, config, architecture, fallback=fallback)
        if tensors[theirs].fallback:
            fallbacks[name] = tensors[theirs].fallback
    for theirs, tensor in list(tensors.items()):
        if tensor.scale != 1:
            tensors[f"{theirs.removesuffix('weight')}scale"] = _vector(np.array([tensor.scale], np.float32))
    tensors.update((name, _vector(table)) for name, table in tables.items())
    with whole_file(out, bring=leave_to_system) as aside:
        writer: Any = gguf.GGUFWriter(aside, architecture.name)
        try:
            _describe(writer, numbers, architecture)
            if source.fit:
                writer.add_string("qkit.fit", json.dumps(dict(source.fit), sort_keys=True))
            _put_vocabulary(writer, vocabulary)
            _write(writer, tensors)
            if source.sealed:
                source.sealed.compare(name for name in source.sealed.left if name.endswith(COMPUTED))
        except BaseException:
            with suppress(OSError):  # it would write the rest to a full disk, and fail as before
                writer.close()
            raise
        writer.close()
    kinds = Counter(tensor.kind for tensor in tensors.values() if tensor.kind not in FLOATS.values())
    notes = (*_limits(config, numbers), *_large_floats(tensors), *(vocabulary.notes if vocabulary else [NO_TOKENIZER]))
    return Written(dict(sorted(kinds.items())), fallbacks, notes)


def _tensor(
    source: Snapshot, name: str, config: Mapping[str, Any], architecture: Architecture, *, fallback: str | None
) -> Tensor:
    order = rotary_order(name, rows_of(source, name), config, architecture)
    weight = source.weights.get(name.removesuffix(".weight"))
    if weight is not None:
        return weight_tensor(name, weight, order, architecture, fallback=fallback)
    return float_tensor(name, source.tensors[name], order, architecture)


def _vector(numbers: Any) -> Tensor:
    return Tensor("F32", numbers.shape, lambda: [numbers])


def _limits(config: Mapping[str, Any], numbers: Mapping[str, Any]) -> Iterator[str]:
    """Notes on the length of a text, where llama.cpp computes longer or shorter ones otherwise."""
    length = numbers["context_length"]
    if length < config["max_position_embeddings"]:
        yield f"a context of {length:,}, which is the sliding window, since llama.cpp attends to everything in such a model"
    if numbers.get("rope.scaling.type") == "longrope":
        old = numbers["rope.scaling.original_context_length"]
        yield f"llama.cpp chooses between short and long factors by the size of its context: give it -c {old} for short texts"


def _large_floats(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Notes on the embedding and the head, where they stay float though other weights are quantized."""
    quantized = any(tensor.kind not in FLOATS.values() for tensor in tensors.values())
    for name in ("token_embd.weight", "output.weight"):
        tensor = tensors.get(name)
        if quantized and tensor is not None and tensor.kind in FLOATS.values() and not tensor.fallback:
            yield f"{name} stays {tensor.kind}: llama-quantize quantizes it, and so does a recipe whose name ends in -all"


def _write(writer: Any, tensors: Mapping[str, Tensor]) -> None:
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
    reserve(file.fileno(), begins.pop())  # padding is zeros

    def write(batch: Sequence[tuple[int, Tensor]]) -> None:
        for begin, tensor in batch:
            for block in tensor.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                write_all(file.fileno(), data, begin)
                begin += len(data)

    in_threads(write, batches(zip(begins, tensors.values(), strict=True), lambda one: _nbytes(one[1])))
    writer.flush()


def _nbytes(tensor: Tensor) -> int:
    import gguf

    many, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return int(prod(tensor.shape) // many * nbytes)


def _padded(writer: Any, tensor: Tensor) -> int:
    """Bytes of a tensor and of the padding after it."""
    return int(writer.ggml_pad(_nbytes(tensor), writer.data_alignment))


def _describe(writer: Any, numbers: Mapping[str, Any], architecture: Architecture) -> None:
    """Writes the model's numbers."""
    writer.add_quantization_version(BLOCKS)
    adders = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for name, value in numbers.items():
        add = adders[type(value)]
        add(f"{architecture.name}.{name}", value)


def _put_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Writes the tokenizer, or that there is none."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list([piece.text for piece in vocabulary.pieces])
    writer.add_token_types([piece.kind for piece in vocabulary.pieces])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores([piece.score for piece in vocabulary.pieces])
    for name, i in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(i)
    for name in ("bos", "eos"):
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", bool(vocabulary.adds[name]))
    if "space_prefix" in vocabulary.adds:
        writer.add_add_space_prefix(bool(vocabulary.adds["space_prefix"]))
    others = sorted(vocabulary.templates.keys() - {"default"})
    for name, text in vocabulary.templates.items():
        writer.add_string("tokenizer.chat_template" + (f".{name}" if name in others else ""), text)
    if others:
        writer.add_array("tokenizer.chat_templates", others)
