"""Small models that all tests share: two layers, a Llama that is the same on every engine, and the families of checkpoints."""

import atexit
import json
import shutil
from functools import wraps
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from tables import DTYPES

import qkit
from qkit.testing.hard_tensors import random


def made_once(make):
    """`make(folder, ...)` that fills the folder itself the first time, and copies that folder for equal arguments later."""
    made = {}

    @wraps(make)
    def copied(folder, *arguments, **options):
        key = json.dumps([arguments, options], sort_keys=True)
        if key not in made:
            home = mkdtemp()
            atexit.register(shutil.rmtree, home, ignore_errors=True)
            made[key] = make(Path(home) / "made", *arguments, **options)
        shutil.copytree(made[key], folder, dirs_exist_ok=True)
        return folder

    return copied


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},  # nobody's default
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
SEED = 7
#: The module and function that seed an engine, and the module of its layers.
NETWORKS = {"torchao": ("torch", "manual_seed", "torch.nn"), "mlx": ("mlx.core.random", "seed", "mlx.nn")}


def build(name, **changes):
    """The Llama on engine `name`, with weights drawn by NumPy, so that they are the same on every engine."""
    engine = qkit.backend(name)
    model = engine.build({**CONFIG, **changes})
    drawing = np.random.default_rng(SEED)
    drawn = {}
    for key, tensor in sorted(engine.tensors(model).items()):
        old = engine.to_numpy(tensor)
        drawn[key] = (drawing.standard_normal(old.shape) * (old.shape[-1] ** -0.5)).astype(old.dtype)
    engine.fill(model, drawn)
    return model


def logits(name, model):
    """Float32 logits of `model` on the test tokens."""
    return qkit.backend(name).logits(model, TOKENS)


#: A Llama for tests that train it.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


def small(name, **changes):
    """The test Llama on engine `name`, smaller."""
    return build(name, **{**SMALL, **changes})


def inputs(name, rows=5, width=64, *, seed=1, dtype="float32"):
    """Standard-normal numbers [rows, width] as an array of engine `name`; the same numbers on every engine."""
    return qkit.backend(name).from_numpy(random((rows, width), seed, dtype))


def mlp(name, *, out=64, bias=True, linear=None):
    """Two layers, 64 -> 96 -> `out`, and a ReLU between, of engine `name`'s own modules; `bias` is that of the second."""
    module, seed, networks = NETWORKS[name]
    getattr(import_module(module), seed)(0)
    nn = import_module(networks)
    linear = linear or nn.Linear
    return nn.Sequential(linear(64, 96), nn.ReLU(), linear(96, out, bias=bias))


def weight(dtype="float32", shape=(24, 256), scale=1.0):
    """A standard-normal weight, times `scale`, in NumPy."""
    return (np.random.default_rng(1).standard_normal(shape) * scale).astype(DTYPES[dtype])


# Checkpoints

COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS = {"head_dim": 32}

THETA = 30000.0  # nobody's default
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

#: By model type: what its configuration has beyond `COMMON`.
FAMILIES = {
    "llama": {**ROPE},
    "mistral": {**ROPE},
    "qwen2": {**ROPE},
    "qwen3": {**ROPE, **HEADS},
    "gemma": {**ROPE, **HEADS},
    "gemma2": {**ROPE, **HEADS, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        **HEADS,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "sliding_window": 64,
        "hidden_size": 256,  # mlx-lm 0.32.2 rounds its root to bfloat16
        "rope_parameters": {"full_attention": ROPE["rope_parameters"], **LOCAL},
    },
    "gpt_neox": {
        "intermediate_size": 512,  # mlx-lm takes four times the hidden size for granted
        "hidden_act": "gelu_pytorch_tanh",  # and this
        "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "mixtral": {**ROPE, "num_local_experts": 4},
    "qwen3_moe": {**ROPE, **HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "qwen2_moe": {
        **ROPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gpt_oss": {**ROPE, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "deepseek_v3": {
        **ROPE,
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size"), 64),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
        **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
    },
    "deepseek_v2": {
        **ROPE,
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size"), 64),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
        **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
    },
    "lfm2_moe": {
        **ROPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
}


@made_once
def make(folder, family, *, dtype="float32", **changes):
    """A checkpoint of transformers' own making in `folder`, with weights drawn by NumPy and a tokenizer of bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**COMMON, **FAMILIES[family], **changes}
    if family == "gpt_neox":
        del given["num_key_value_heads"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given), dtype=getattr(torch, dtype))
    drawing = np.random.default_rng(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            drawn = drawing.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if parameter.ndim == 1:  # whole 256ths, so that 1 + w is exact for Gemma's norms in GGUF
                parameter.copy_(torch.from_numpy(drawn * 51).round() / 256)
            else:
                parameter.copy_(torch.from_numpy(drawn) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
