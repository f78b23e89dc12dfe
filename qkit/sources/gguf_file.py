"""A GGUF file as a model of transformers: names, rows and norms turned back, and a config.json from its numbers.

Read off gguf 0.19 and llama.cpp 0.5; the inverse of `qkit.exchange.export_gguf`. Mixtures of experts are refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qkit.errors import ArtifactError, BackendError
from qkit.formats.gguf_config import ARCHITECTURES, COUNTS, Architecture, architecture_of, head_width, numbers_of
from qkit.formats.gguf_rope import rope_tables
from qkit.formats.gguf_tokenizer import SPM_MODEL, TOKENIZER
from qkit.formats.gguf_tokenizer_files import tokenizer_files
from qkit.installation import how_to_install
from qkit.qtensor import DType
from qkit.sources.detect import Detected
from qkit.sources.encoded import Encoded
from qkit.sources.gguf_blocks import HELD, GgufBlocks, GgufValues
from qkit.sources.parts import float_type
from qkit.sources.source import Source
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.read import Stored

#: By GGUF's architecture: transformers' type of model and the class of its language model.
TYPES: Final = {
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "gemma": ("gemma", "Gemma"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3": ("gemma3_text", "Gemma3"),
}
LAYER: Final = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *(f"self_attn.{one}" for one in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{one}" for one in ("gate_proj", "up_proj", "down_proj")),
)
TOKENIZERS: Final = (TOKENIZER, SPM_MODEL)
FLOATS: Final[Mapping[str, DType]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LLAMA3: Final = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS: Final = (8.0, 32.0, 16.0)  #: of Llama 3.1 and 3.2


def open_gguf(file: Path) -> Source:
    """The model in the GGUF file `file`.

    Raises:
        BackendError: gguf is not installed.
        ArtifactError: the file is unsound, or has a model or a tensor that qkit does not know.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise BackendError(f"GGUF files need the gguf package: {how_to_install('gguf')}") from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        found = {one.name: one for one in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError, TypeError, UnicodeDecodeError, OverflowError) as error:
        raise ArtifactError(f"{file} is no sound GGUF file ({type(error).__name__}: {error}): fetch it again") from None
    try:
        return _open(file, fields, found)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}") from None


def _open(file: Path, fields: Mapping[str, Any], found: dict[str, Any]) -> Source:
    import gguf

    name = str(fields.get("general.architecture"))
    if name not in TYPES:
        raise ArtifactError(
            f"its architecture is {name!r}: qkit reads {', '.join(TYPES)}; take the model's own directory"
        )
    shapes = {one.name: tuple(int(n) for n in reversed(one.shape)) for one in found.values()}
    config = _config(fields, name, shapes, found)
    architecture = architecture_of(config)
    index = next(i for i, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(index, config["num_hidden_layers"])
    layers = [f"model.layers.{i}.{one}" for i in range(config["num_hidden_layers"]) for one in LAYER]
    ours = {
        f"{theirs}.{end}": f"{path}.{end}"
        for path in ("model.embed_tokens", "model.norm", "lm_head", *layers)
        if (theirs := names.get_name(path)) is not None
        for end in ("weight", "bias")
    }
    plain = {ours[theirs]: _stored(file, one, shapes[theirs]) for theirs, one in found.items() if theirs in ours}
    stated = {name: one for name, one in plain.items() if one.slot.dtype in FLOATS}
    dtype = float_type(None, stated) or "float32"
    config = {**config, "dtype": dtype}
    tensors: dict[str, Stored] = {}
    for theirs, one in found.items():
        if theirs == "rope_freqs.weight" or theirs.startswith("rope_factors_"):
            continue
        if theirs.endswith(".scale") and f"{theirs.removesuffix('scale')}weight" in ours:
            continue
        if theirs not in ours:
            raise ArtifactError(f"the tensor {theirs} has no name in a {config['model_type']!r} of transformers")
        scale = found.get(f"{theirs.removesuffix('weight')}scale")
        tensors[ours[theirs]] = _tensor(
            file, one, ours[theirs], shapes[theirs], config=config, architecture=architecture, dtype=dtype, scale=scale
        )
    detected = Detected("gguf", {}, file.name, config)
    files, said = _tokenizer(file, fields)
    return Source(file.parent, detected, tensors, (), files, said)


def _tokenizer(file: Path, fields: Mapping[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of the tokenizer in the keys of `file`, unless one lies beside it; and a sentence on where it came from."""
    if beside := next((name for name in TOKENIZERS if (file.parent / name).exists()), ""):
        return {}, (f"the tokenizer is {beside}, which lies beside the file",)
    try:
        files = tokenizer_files(fields)
    except ArtifactError as error:
        return {}, (f"{error}: put the model's own tokenizer.json beside the file; the output has no tokenizer",)
    return files, () if files else ("the file has no tokenizer: put the model's own tokenizer.json beside it",)


def _tensor(
    file: Path,
    one: Any,
    name: str,
    shape: tuple[int, ...],
    *,
    config: Mapping[str, Any],
    architecture: Architecture,
    dtype: DType,
    scale: Any,
) -> Stored:
    kind = one.tensor_type.name
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    turned = heads.get(name.split(".")[-2], 0) if architecture.interleaved else 0
    shift = -1.0 if architecture.norms_plus_one and name.endswith("norm.weight") else 0.0
    if FLOATS.get(kind) == dtype and not turned and not shift:
        return _stored(file, one, shape, name)
    rows = shape[0] if len(shape) > 1 or turned else 1
    raw = Slot(name, "U8", (rows, int(one.n_bytes) // rows))
    parts = {"blocks": Stored(raw, file, int(one.data_offset))}
    form: Any = GgufValues(kind, turned, shift)
    if kind in HELD:
        form = GgufBlocks(kind, turned, scale is not None)
        if scale is not None:
            parts["factor"] = _stored(file, scale, (1,))
    return Encoded(Slot(name, TYPE_NAMES[dtype], shape), file, int(one.data_offset), form, parts)


def _stored(file: Path, one: Any, shape: tuple[int, ...], name: str = "") -> Stored:
    kind = one.tensor_type.name
    dtype = TYPE_NAMES[FLOATS[kind]] if kind in FLOATS else "U8"
    return Stored(Slot(name or one.name, dtype, shape), file, int(one.data_offset))


def _config(
    fields: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]
) -> dict[str, Any]:
    """transformers' configuration of the model with these numbers, which GGUF's own numbers of it have to equal."""
    numbers = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    if numbers.get("expert_count"):
        raise ArtifactError("it is a mixture of experts: qkit reads no such GGUF; take the model's own directory")
    kind, prefix = TYPES[name]
    if "token_embd.weight" not in shapes:
        raise ArtifactError("token_embd.weight is missing: fetch the file again")
    numbers.setdefault("vocab_size", shapes["token_embd.weight"][0])
    architecture = ARCHITECTURES[kind]
    config: dict[str, Any] = {"model_type": kind, "architectures": [f"{prefix}ForCausalLM"]}
    for theirs, ours in (*COUNTS.items(), *architecture.keys):
        if theirs in numbers:
            config[ours] = numbers[theirs]
        elif theirs in COUNTS and theirs != "attention.head_count_kv":
            raise ArtifactError(f"{name}.{theirs} is missing: fetch the file again")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if any(type(config[key]) is not int for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")):
        raise ArtifactError("layers with different numbers of heads: qkit reads no such GGUF")
    config["head_dim"] = numbers.get("attention.key_length") or head_width(config)
    config["hidden_activation" if kind.startswith("gemma") else "hidden_act"] = architecture.activation
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if "blk.0.attn_q.bias" in shapes and kind in ("llama", "qwen3"):
        config["attention_bias"] = True
    if architecture.period:
        config["sliding_window"] = numbers.get("attention.sliding_window")
        config["query_pre_attn_scalar"] = config["head_dim"]
        count, every = config["num_hidden_layers"], architecture.period
        config["layer_types"] = [("full" if (i + 1) % every == 0 else "sliding") + "_attention" for i in range(count)]
    for one in ("bos", "eos"):
        if (value := fields.get(f"tokenizer.ggml.{one}_token_id")) is not None:
            config[f"{one}_token_id"] = value
    config["rope_parameters"] = _rope(numbers, config, found)
    _check(numbers, config, architecture)
    return config


def _rope(numbers: Mapping[str, Any], config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    theta = float(numbers.get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = numbers.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(numbers["rope.scaling.factor"])}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = numbers.get("rope.scaling.original_context_length")
    elif kind not in (None, "none"):
        raise ArtifactError(f"a rope of type {kind!r}: qkit reads no such GGUF; take the model's own directory")
    if "rope_freqs.weight" in found:
        table = np.asarray(found["rope_freqs.weight"].data, np.float32).reshape(-1)
        rope = next((one for one in _llama3(theta) if _same(one, table, config)), {})
        if not rope:
            raise ArtifactError("its table of rope factors is that of no Llama 3: take the model's own directory")
    if config["model_type"] == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": float(numbers.get("rope.freq_base_swa", 10000.0))}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3(theta: float) -> Iterator[dict[str, Any]]:
    return ({**LLAMA3, "rope_theta": theta, "factor": factor} for factor in FACTORS)


def _same(rope: Mapping[str, Any], table: Any, config: Mapping[str, Any]) -> bool:
    mine = rope_tables({**config, "rope_parameters": rope}, head_width(config))["rope_freqs.weight"]
    return mine.shape == table.shape and bool(np.allclose(mine, table, rtol=1e-6))


def _check(numbers: Mapping[str, Any], config: Mapping[str, Any], architecture: Architecture) -> None:
    """Compares GGUF's numbers of `config` with those of the file, and refuses a number that the configuration cannot state."""
    again = numbers_of(config, architecture_of(config))
    for key, value in again.items():
        theirs = numbers.get(key, value)
        if theirs != value and not (isinstance(value, float) and np.isclose(theirs, value, rtol=1e-6)):
            raise ArtifactError(
                f"{architecture.name}.{key} is {theirs!r}, which transformers' configuration cannot state"
            )
