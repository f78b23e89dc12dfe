"""Sliding windows and activations that mlx-lm ignores: qkit's MLX engine computes them, and others are refused by name."""

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_lm.models.cache as caches
import torch
import transformers
from mlx_lm.models.base import create_attention_mask

import qkit
from qkit.cli.application import application
from qkit.formats.mlx_activations import ACTIVATIONS, MENDED
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.mlx_limits import GROUPS, WINDOWLESS, limits_of, sliding_layers
from qkit.formats.mlx_types import OTHERWISE

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 24)).astype(np.int32)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
SLIDING = {
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "phimoe": {"sliding_window": 5, "attention_bias": True, "lm_head_bias": True},
    "starcoder2": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen2_moe": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3_moe": {"sliding_window": 5, "use_sliding_window": True},
}


def of(kind, **changes):
    """A model of transformers with drawn weights."""
    cls = transformers.CONFIG_MAPPING[kind]
    known = set(cls().to_dict())
    config = cls(**{**{key: value for key, value in SIZES.items() if key in known}, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def quantized(model, folder):
    """`model` quantized and opened on MLX, and its logits on torch."""
    model.save_pretrained(folder / "in")
    done = CliRunner().invoke(application, ["quantize", str(folder / "in"), str(folder / "out"), "-r", "int8-g32"])
    assert done.exit_code == 0, (done.output, done.exception)
    with torch.no_grad():
        want = qkit.load(folder / "out", backend="torchao")(torch.from_numpy(TOKENS).long()).logits.float().numpy()
    return qkit.load(folder / "out", backend="mlx"), want


def test_every_type_without_windows_is_here():
    assert set(SLIDING) == set(WINDOWLESS)


@pytest.mark.parametrize("kind", SLIDING)
def test_a_sliding_window_is_that_of_transformers(kind, tmp_path):
    model = of(kind, **SLIDING[kind])
    opened, want = quantized(model, tmp_path)
    got = qkit.backend("mlx").logits(opened, TOKENS)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()  # sums in another order
    for layer in opened.layers:  # mlx-lm's own blocks
        base = type(layer).__mro__[1]
        layer.__class__ = base if base.__name__ == type(layer).__name__ else type(layer)
    assert np.abs(qkit.backend("mlx").logits(opened, TOKENS) - want).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize(("kind", "step"), [("mistral", 1), ("qwen3", 7), ("qwen2_moe", 3)])
def test_a_sliding_window_holds_with_a_cache(kind, step, tmp_path):
    opened, want = quantized(of(kind, **SLIDING[kind]), tmp_path)
    cache = caches.make_prompt_cache(opened)
    parts = [opened(mx.array(TOKENS[:, i : i + step]), cache=cache) for i in range(0, TOKENS.shape[1], step)]
    got = np.array(mx.concatenate(parts, axis=1))
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()  # sums in another order


@pytest.mark.parametrize("kind", SLIDING)
def test_the_rule_of_layers_is_that_of_transformers(kind):
    changes = SLIDING[kind]
    model = of(kind, **changes)
    masks = getattr(model.config, "layer_types", None) if kind in ("qwen2", "qwen3", "qwen2_moe") else None
    slides = [one == "sliding_attention" for one in masks] if masks else [True] * 4
    config = {**model.config.to_dict(), "layer_types": changes.get("layer_types")}
    assert sliding_layers(config) == (5, slides)
    assert sliding_layers({**config, "sliding_window": None}) == (0, [])
    if "use_sliding_window" in changes:
        assert sliding_layers({**config, "use_sliding_window": False}) == (0, [])
        assert sliding_layers({key: value for key, value in config.items() if key != "use_sliding_window"}) == (0, [])


def test_a_mask_for_a_short_text_stays_as_it_is():
    h = mx.zeros((1, 4, 8))
    assert create_attention_mask(h, None) == "causal"
    opened = qkit.backend("mlx").build({**of("mistral", sliding_window=24).config.to_dict()})
    before = qkit.backend("mlx").logits(opened, TOKENS)
    for layer in opened.layers:
        layer.__class__ = type(layer).__mro__[1]
    assert np.array_equal(qkit.backend("mlx").logits(opened, TOKENS), before)


#: Types that mlx-lm computes otherwise, and their configurations.
COMPUTED = {
    "glm": {"head_dim": 16, "attention_bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "mamba_d_state": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
        "num_experts": 4,
    },
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_type_that_mlx_lm_computes_otherwise_is_computed_as_in_transformers(kind, tmp_path):
    assert set(COMPUTED) == set(OTHERWISE)
    model = of(kind, **COMPUTED[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):  # more than the probabilities of experts differ
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    opened, want = quantized(model, tmp_path)
    off = np.abs(qkit.backend("mlx").logits(opened, TOKENS) - want).max() / np.abs(want).max()
    assert off <= 2e-5  # sums in another order
    qkit.save(opened, tmp_path / "again")
    again = qkit.load(tmp_path / "again", backend="torchao")
    with torch.no_grad():
        assert np.array_equal(again(torch.from_numpy(TOKENS).long()).logits.float().numpy(), want)


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_of_states_are_normalized_one_by_one(kind, tmp_path):
    sizes = {
        "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
        "granitemoehybrid": {
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "shared_intermediate_size": 64,
        },
    }
    model = of(kind, **sizes[kind], **{GROUPS[kind]: 2})
    opened, want = quantized(model, tmp_path)
    assert np.abs(qkit.backend("mlx").logits(opened, TOKENS) - want).max() <= 2e-5 * np.abs(want).max()  # other order
    said = [readers for readers, text in limits_of(model.config.to_dict()) if "groups" in text]
    assert said == [("mlx-lm",)]


@pytest.mark.parametrize("kind", MENDED)
@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_a_form_of_gelu_is_that_of_the_configuration(kind, name, tmp_path):
    key = ACTIVATIONS[kind].key
    model = of(kind, **{key: name}, **({"intermediate_size": 256} if kind == "gpt_neox" else {}))
    opened, want = quantized(model, tmp_path)
    off = np.abs(qkit.backend("mlx").logits(opened, TOKENS) - want).max() / np.abs(want).max()
    assert off <= 2e-5  # sums in another order; the other form moves logits by 1e-4 and more


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "gpt2", "phi", "nemotron", "gemma3_text", "starcoder2"])
def test_an_activation_that_mlx_lm_does_not_compute_is_refused_by_name(kind):
    known = ACTIVATIONS.get(kind)
    key = known.key if known else "hidden_act"
    config = {**transformers.CONFIG_MAPPING[kind]().to_dict(), key: "relu"}
    with pytest.raises(qkit.BackendError, match=f"and not relu, as {key} asks; use another engine"):
        qkit.backend("mlx").build(config)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_default_of_transformers_is_computed(kind):
    if FAMILIES[kind].language or kind in ("llava", "mistral3"):
        return  # their language models are types of their own
    known = ACTIVATIONS.get(kind)
    key = "hidden_act" if kind not in ACTIVATIONS else known and known.key
    default = transformers.CONFIG_MAPPING[kind]()
    if key is not None:
        assert getattr(default, key) == (known.default if known else "silu")
