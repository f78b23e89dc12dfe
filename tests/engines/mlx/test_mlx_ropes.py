"""Scaled ropes that mlx-lm computes otherwise than transformers: qkit's MLX engine has those of transformers."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import torch
import transformers
from mlx_lm.models.cache import make_prompt_cache

import qkit
from qkit.formats.mlx_limits import limits_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
MLX, TORCH = qkit.backend("mlx"), qkit.backend("torchao")
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 40)).astype(np.int32)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * i for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 24,
}
SHORT = TOKENS[:, :16]
#: By name: the type of the model, its rope, and other keys of its configuration.
ROPES = {
    "gpt_oss": ("gpt_oss", {**YARN, "truncate": False}, {}),
    "llama, factor": ("llama", {**YARN, "attention_factor": 1.5}, {}),
    "llama, betas": ("llama", {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}, {}),
    "llama, one mscale": ("llama", {**YARN, "mscale": 0.707}, {}),
    "deepseek_v2": ("deepseek_v2", {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, {}),
    "deepseek_v2, truncate": ("deepseek_v2", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, {}),
    "deepseek_v3": ("deepseek_v3", {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, {"q_lora_rank": None}),
    "phi3": ("phi3", LONG, {}),
    "phi3, factor": ("phi3", {**LONG, "attention_factor": 1.25}, {}),
    "llama, longrope": ("llama", {**LONG, "factor": 4.0}, {}),
    "phimoe": (
        "phimoe",
        {**LONG, "short_mscale": 1.1, "long_mscale": 1.3},
        {"attention_bias": True, "lm_head_bias": True, "sliding_window": None},
    ),
}


def of(name):
    """A model of transformers with drawn weights."""
    kind, rope, changes = ROPES[name]
    cls = transformers.CONFIG_MAPPING[kind]
    known = set(cls().to_dict())
    sizes = {key: value for key, value in SIZES.items() if key in known} | changes
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**sizes, rope_parameters=dict(rope)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model.eval()


def older(config):
    """The configuration as models before transformers 5 have it."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    return {**config, "rope_scaling": {**rope, "type": rope["rope_type"]}}


@pytest.mark.parametrize("spelled", ["new", "older"])
@pytest.mark.parametrize("name", ROPES)
def test_a_scaled_rope_is_that_of_transformers_for_short_and_long_texts(name, spelled, tmp_path):
    model = of(name)
    model.save_pretrained(tmp_path)
    if spelled == "older":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(older(config)))
    opened = qkit.load(tmp_path, backend="mlx")
    for tokens in (SHORT, TOKENS):
        want = TORCH.logits(model, tokens)
        assert np.abs(MLX.logits(opened, tokens) - want).max() <= 3e-5 * np.abs(want).max()  # sums in another order


def test_factors_depend_on_the_longest_of_several_texts(tmp_path):
    of("phi3").save_pretrained(tmp_path)
    rope = qkit.load(tmp_path, backend="mlx").layers[0].self_attn.rope
    x = mx.random.normal((2, 2, 4, 32))
    for offsets in ([3, 9], [3, 30]):
        want = [rope(x, offset=max(offsets)), rope(x, offset=mx.array(offsets))]
        assert mx.allclose(want[0][int(np.argmax(offsets))], want[1][int(np.argmax(offsets))], atol=1e-6)


def test_a_text_that_grows_past_the_original_length_computes_as_transformers_with_a_cache(tmp_path):
    model = of("phi3")
    model.save_pretrained(tmp_path)
    opened = qkit.load(tmp_path, backend="mlx")
    cache, past, want = make_prompt_cache(opened), None, []
    got = [opened(mx.array(TOKENS[:, i : i + 8]), cache=cache) for i in range(0, 40, 8)]
    with torch.no_grad():
        for i in range(0, 40, 8):
            out = model(torch.from_numpy(TOKENS[:, i : i + 8]).long(), past_key_values=past, use_cache=True)
            past = out.past_key_values
            want.append(out.logits.numpy())
    want, got = np.concatenate(want, axis=1), np.array(mx.concatenate(got, axis=1))
    assert np.abs(got - want).max() <= 3e-5 * np.abs(want).max()  # sums in another order


@pytest.mark.parametrize(
    ("name", "word"), [("gpt_oss", "truncate"), ("llama, factor", "attention_factor"), ("phi3", "long factors")]
)
def test_the_plan_says_that_mlx_lm_computes_another_rope(name, word):
    for config in (of(name).config.to_dict(), older(of(name).config.to_dict())):
        said = [(readers, text) for readers, text in limits_of(config) if word in text]
        assert [readers for readers, _ in said] == [("mlx-lm",)]
