"""By type of model: what mlx-lm reads of a configuration, and how it names tensors. Read off mlx-lm 0.32.2 (`models/*.py`).

The table has the types whose logits equal those of transformers 5.23, as the gate over families shows. Others are refused.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.mlx_names import ALONE, DENSE, GPT, NEOX, NESTED_MODULES, NESTED_NAMES, NUMBERS, TOWERS
from qkit.formats.rope import NESTED, ropes, spell_rope

Config = Mapping[str, Any]

LLAMA: Final = frozenset({"rope_theta", "rope_scaling"})
THETA: Final = frozenset({"rope_theta"})
PARTIAL: Final = frozenset({"rope_theta", "partial_rotary_factor"})
LLAMA_PARTIAL: Final = LLAMA | PARTIAL
OWN: Final = frozenset({"rope_theta", "rope_parameters"})  #: read as transformers writes it


@dataclass(frozen=True, slots=True)
class Family:
    """A type of model in mlx-lm.

    Attributes:
        rope: the keys of a rotary embedding that it reads.
        keys: the other keys that it reads, from a configuration of transformers; raises `ArtifactError` where it has none.
        names: patterns of tensor names in files, the text that mlx-lm has instead, and both for the way back.
        modules: patterns of paths in its modules, and the text that files have instead.
        latent: whether it splits `kv_b_proj`, and quantizes the parts again where it is quantized.
        stack: the last part of the path of stacked experts, whose block is called `experts` in files.
        projections: names of the projections of experts, where they are others than in files.
        biases: whether files join the biases of gate and up, whose outputs stand in turn.
        ignored: ends of names of tensors that it does not read, although results depend on them.
        language: the type of its language model, whose settings stand in `text_config`; empty where it is one itself.
        shifts: whether mlx-lm changes the numbers of other tensors where experts are stored one by one.
    """

    rope: Collection[str] = frozenset()
    keys: Callable[[Config], dict[str, Any]] = lambda _: {}
    names: tuple[tuple[str, str, str, str], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    latent: bool = False
    stack: str = "switch_mlp"
    projections: tuple[tuple[str, str], ...] = ()
    biases: bool = False
    ignored: tuple[str, ...] = ()
    shifts: bool = False
    language: str = ""


def read_config(config: Config, *, family: Family) -> dict[str, Any]:
    """`config` of transformers with the keys that mlx-lm reads. Existing keys stay, unless mlx-lm reads others from them.

    Raises:
        ArtifactError: mlx-lm reads a key that the configuration does not have.
        BackendError: mlx-lm computes another rotary embedding; see `spell_rope`.
    """
    known = {name: value for name, value in config.items() if value is not None}
    if isinstance(inner := known.get("text_config"), dict):
        known["text_config"] = _language(known, inner, family)
    elif family.language:  # older configurations of pictures and text have all keys in one table
        return read_config(config, family=FAMILIES[family.language])
    if "head_dim" not in known and {"hidden_size", "num_attention_heads"} <= known.keys():
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]  # what null means in transformers
    return {**spell_rope(known, family.rope), **family.keys(config)}


def _language(config: Config, inner: Config, family: Family) -> dict[str, Any]:
    """The `text_config` of a model of pictures and text, with the keys that mlx-lm reads, some of which stand outside of it."""
    own = FAMILIES.get(family.language or str(inner.get("model_type")), Family(NESTED))
    found = read_config(inner, family=own)
    if "tie_word_embeddings" in config:
        found["tie_word_embeddings"] = config["tie_word_embeddings"]
    elif family.language:
        found.setdefault("tie_word_embeddings", False)  # transformers' default, and not mlx-lm's
    if "final_logit_softcapping" in inner:
        found["final_logit_softcapping"] = inner["final_logit_softcapping"]  # null is none, and a missing key is not
    return found


def _outer_vocabulary(config: Config) -> dict[str, Any]:
    """The size of the vocabulary outside of `text_config`, where mlx-lm has a default that it prefers."""
    inner = config.get("text_config") or {}
    return {"vocab_size": inner["vocab_size"]} if "vocab_size" in inner else {}


def _count(config: Config) -> dict[str, Any]:
    return {"num_experts": config.get("num_experts") or config["num_local_experts"]}


def _no_scaling(config: Config) -> dict[str, Any]:
    rope = next(iter(ropes(config).values()), {})
    scaled = config.get("rope_scaling") or rope.get("rope_type", "default") != "default"
    return {} if scaled else {"rope_scaling": None}  # a key without a default


def _patterned(config: Config) -> dict[str, Any]:
    _full(config)
    kinds = config.get("layer_types") or []
    pattern = "".join("G" if kind == "full_attention" else "L" for kind in kinds)
    return {**_no_scaling(config), **({"sliding_window_pattern": pattern} if "L" in pattern else {})}


def _sparse_layers(config: Config) -> dict[str, Any]:
    return {"is_moe_layer": [kind == "sparse" for kind in config.get("mlp_layer_types") or []]}


def _own_names(config: Config) -> dict[str, Any]:
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    layers = [kinds.get(kind, kind) for kind in config.get("layer_types") or []]
    return {"layer_types": layers, "position_embedding_type": config.get("position_embedding_type") or "nope"}


def _expanded(config: Config) -> dict[str, Any]:
    wide = config.get("expand", 2) * config["hidden_size"]
    return {"intermediate_size": config.get("intermediate_size") or wide}


def _interval(config: Config) -> dict[str, Any]:
    kinds = list(config.get("layer_types") or [])
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((i + 1) % every == 0) for i, kind in enumerate(kinds)):
        raise ArtifactError("mlx-lm alternates full and linear attention regularly, and layer_types does not")
    return {"full_attention_interval": every}


def _inner(config: Config) -> dict[str, Any]:
    return {"n_inner": config.get("n_inner") or 4 * config["n_embd"]}


def _context(config: Config) -> dict[str, Any]:
    return {"n_ctx": config.get("n_ctx") or config["n_positions"]}


def _four_times(config: Config) -> dict[str, Any]:
    if config.get("intermediate_size", 4 * config["hidden_size"]) != 4 * config["hidden_size"]:
        raise ArtifactError("mlx-lm's gpt_neox has an intermediate_size of four times the hidden size alone")
    return {}


def _full(config: Config) -> dict[str, Any]:
    if "full_attention" not in (config.get("layer_types") or ["full_attention"]):
        raise ArtifactError(
            f"mlx-lm's {config.get('model_type')} wants a layer of full attention, and layer_types has none"
        )
    return {}


def _block(config: Config) -> dict[str, Any]:
    _full(config)
    if set(config.get("layer_types") or ["conv"]) == {"full_attention"}:
        raise ArtifactError("mlx-lm's lfm2 wants a layer that is a convolution, and layer_types has none")
    return {"block_dim": config.get("block_dim") or config["hidden_size"]}


def _rotary(config: Config) -> dict[str, Any]:
    rope = next(iter(ropes(config).values()), {})
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return {"rotary_dim": config.get("rotary_dim") or int(head * partial), "shared_intermediate_size": 0}


def _all_rotary(config: Config) -> dict[str, Any]:
    rope = next(iter(ropes(config).values()), {})
    return {"partial_rotary_factor": config.get("partial_rotary_factor") or rope.get("partial_rotary_factor", 1.0)}


def _with_biases(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "lm_head_bias"):
        if not config.get(key):
            raise ArtifactError(f"mlx-lm's phimoe has biases everywhere, and this model has {key} = false")
    return {}


def _queries(config: Config) -> dict[str, Any]:
    key = "q_lora_rank"  # null is a plain projection, and a missing key is not
    return {key: config[key]} if key in config else {}


def _normalized(config: Config) -> dict[str, Any]:
    return {**_count(config), "norm_topk_prob": True}  # as transformers computes it, without a key


def _all_sparse(config: Config) -> dict[str, Any]:
    dense = {
        "first_k_dense_replace": 0,
        "intermediate_size": config["moe_intermediate_size"],
    }  # transformers has no such layer
    return {**{key: config.get(key) or value for key, value in dense.items()}, **_all_rotary(config)}


def _yarn(config: Config) -> dict[str, Any]:
    scaled = (
        config.get("rope_scaling") or next(iter(ropes(config).values()), {}).get("rope_type", "default") != "default"
    )
    none = {} if scaled else {"rope_scaling": {"type": "yarn", "factor": 1.0}}  # it takes no other type; this is none
    return {**_queries(config), **none}


def _cap(config: Config) -> dict[str, Any]:
    key = "final_logit_softcapping"
    return {key: config[key]} if key in config else {}  # null is none, and a missing key is not


def _apertus(config: Config) -> dict[str, Any]:
    return {"mlp_bias": False, "post_norm": False, "qk_norm": True}  # transformers has no other


FAMILIES: Final[Mapping[str, Family]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "olmo2", "granite", "smollm3", "hunyuan_v1_dense"), Family(LLAMA)),
    **dict.fromkeys(("seed_oss", "mixtral", "qwen2_moe", "olmoe"), Family(LLAMA)),
    **dict.fromkeys(("gemma", "gemma2", "starcoder2", "helium", "ernie4_5", "glm"), Family(THETA)),
    **dict.fromkeys(("phi", "stablelm", "glm4"), Family(PARTIAL)),
    **dict.fromkeys(("phi3", "nemotron"), Family(LLAMA_PARTIAL)),
    **dict.fromkeys(("mamba", "falcon_mamba"), Family()),
    "mamba2": Family(keys=_expanded),
    "gptj": Family(modules=GPT),
    "qwen3": Family(LLAMA | OWN),
    "gemma3_text": Family(LLAMA | {"rope_local_base_freq", "sliding_window_pattern"}, _full),
    "gpt_neox": Family(
        frozenset({"rotary_emb_base", "rotary_pct"}),
        _four_times,
        modules=NEOX,
        names=((r"^lm_head\.", "embed_out.", r"^embed_out\.", "lm_head."),),
    ),
    "gpt2": Family(
        keys=_context,
        modules=GPT,
        names=((r"^transformer\.", "", r"^(?=(?:h|wte|wpe|ln_f)\.)", "transformer."),),
    ),
    "gpt_bigcode": Family(keys=_inner),
    "cohere": Family(THETA),
    "cohere2": Family(THETA | {"sliding_window_pattern"}),
    "olmo3": Family(LLAMA, _full),
    "exaone4": Family(LLAMA | {"sliding_window_pattern"}, _patterned),
    "lfm2": Family(OWN, _block),
    "ministral3": Family(frozenset({"rope_parameters"})),
    "apertus": Family(LLAMA, _apertus),
    "qwen3_moe": Family(LLAMA, _count),
    "qwen3_next": Family(LLAMA_PARTIAL, _interval, shifts=True),
    "gpt_oss": Family(LLAMA, stack="experts", biases=True),
    "deepseek_v2": Family(LLAMA, _yarn),
    "deepseek_v3": Family(LLAMA, _queries, latent=True),
    "phimoe": Family(LLAMA, _with_biases),
    "granitemoe": Family(LLAMA),
    "granitemoehybrid": Family(OWN, _own_names),
    "glm4_moe": Family(LLAMA_PARTIAL, _no_scaling),
    "glm4_moe_lite": Family(LLAMA_PARTIAL, _queries, latent=True),
    "dots1": Family(LLAMA, stack="experts"),
    "ernie4_5_moe": Family(THETA, ignored=("e_score_correction_bias",)),
    "lfm2_moe": Family(OWN, names=NUMBERS, modules=DENSE),
    "nemotron_h": Family(projections=(("up_proj", "fc1"), ("down_proj", "fc2"))),
    "exaone_moe": Family(LLAMA | {"rope_parameters"}, _sparse_layers),
    "afmoe": Family(LLAMA, _full, stack="experts"),
    "solar_open": Family(LLAMA_PARTIAL, _all_sparse),
    "mellum": Family(frozenset({"rope_parameters"}), _count),
    "minimax_m2": Family(THETA, _rotary),
    "gemma4_text": Family(frozenset({"rope_parameters", "partial_rotary_factor", "sliding_window_pattern"}), _cap),
    **dict.fromkeys(("llava", "mistral3"), Family(names=TOWERS)),
    "gemma3": Family(keys=_outer_vocabulary, names=TOWERS, language="gemma3_text"),
    "gemma4": Family(keys=_outer_vocabulary, names=NESTED_NAMES, language="gemma4_text"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), Family(names=ALONE, language="qwen2")),
    "qwen3_vl": Family(names=NESTED_NAMES, language="qwen3"),
    "qwen3_vl_moe": Family(names=NESTED_NAMES, modules=NESTED_MODULES, language="qwen3_vl_moe_text"),
    "qwen3_vl_moe_text": Family(LLAMA, _normalized),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), Family(OWN, _interval, shifts=True)),
    "qwen3_5": Family(names=NESTED_NAMES[1:], language="qwen3_5_text", shifts=True),
    "qwen3_5_moe": Family(names=NESTED_NAMES[1:], language="qwen3_5_moe_text", shifts=True),
}
