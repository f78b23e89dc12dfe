"""Published files on MLX: computed buffers are left out, and float32 in half precision is cast or stays, as in torch."""

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import torch
import transformers
from safetensors.torch import load_file, save_file

import qkit
from qkit.cli.application import application

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 12)).astype(np.int32)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def opened(kind, folder, change, dtype="bfloat16"):
    """A model whose file `change` has changed, quantized, on torch and on MLX."""
    cls = transformers.CONFIG_MAPPING[kind]
    known = set(cls().to_dict())
    torch.manual_seed(0)
    config = cls(**{key: value for key, value in SIZES.items() if key in known})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "in")
    tensors = load_file(folder / "in/model.safetensors")
    change(tensors)
    save_file(tensors, folder / "in/model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(application, ["quantize", str(folder / "in"), str(folder / "out"), "-r", "int4-g32"])
    assert done.exit_code == 0, (done.output, done.exception)
    return tuple(qkit.load(folder / "out", backend=name) for name in ("torchao", "mlx"))


def assert_near(on_torch, on_mlx):
    want = qkit.backend("torchao").logits(on_torch, TOKENS)
    off = np.abs(qkit.backend("mlx").logits(on_mlx, TOKENS) - want).max()
    assert off <= 3e-2 * np.abs(want).max()  # bfloat16, summed in another order


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "olmo2", "gpt_neox", "starcoder2"])
def test_computed_buffers_in_files_are_left_out(kind, tmp_path):
    def change(tensors):
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(8)
        for i in (0, 1):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    if kind in ("qwen3", "mistral"):
        on_torch, on_mlx = opened(kind, tmp_path, change)
        assert_near(on_torch, on_mlx)
        return
    cls = transformers.CONFIG_MAPPING[kind]
    config = {**cls().to_dict(), **{key: value for key, value in SIZES.items() if key in cls().to_dict()}}
    config |= {"intermediate_size": 256} if kind == "gpt_neox" else {}
    engine = qkit.backend("mlx")
    model = engine.build(config)
    arrays = {name: engine.to_numpy(one).copy() for name, one in engine.tensors(model).items()}
    engine.fill(model, {**arrays, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)})
    with pytest.raises(qkit.ArtifactError, match="other is in the artifact"):
        engine.fill(model, {**arrays, "model.layers.0.other": np.zeros(8, np.float32)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_in_half_precision_is_cast_as_in_transformers(dtype, tmp_path):
    def change(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = torch.randn(tensors[name].shape) * 0.01 + 1

    on_torch, on_mlx = opened("qwen3", tmp_path, change, dtype)
    assert_near(on_torch, on_mlx)
    ours, theirs = (qkit.backend(name).tensors(one) for name, one in (("torchao", on_torch), ("mlx", on_mlx)))
    for name, tensor in ours.items():
        if "norm" in name:
            assert str(theirs[name].dtype).endswith(dtype)
            assert np.array_equal(np.array(theirs[name].astype(mx.float32)), tensor.float().detach().numpy())


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_tensors_that_transformers_leaves_in_float32_stay_so(kind, tmp_path):
    bias = torch.tensor([0.1, 0.2 + 2**-12, -0.1, 1 / 3])

    def change(tensors):
        tensors[BIAS] = bias

    on_torch, on_mlx = opened(kind, tmp_path, change)
    for name, model in (("torchao", on_torch), ("mlx", on_mlx)):
        engine = qkit.backend(name)
        found = engine.to_numpy(engine.tensors(model)[BIAS])
        assert found.dtype == np.float32
        assert np.array_equal(found, bias.numpy())
    assert_near(on_torch, on_mlx)
    qkit.save(on_mlx, tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors")[BIAS].dtype == torch.float32


def test_a_float32_file_in_a_model_that_somebody_cast_is_still_refused():
    engine = qkit.backend("mlx")
    cls = transformers.CONFIG_MAPPING["qwen3"]
    model = engine.build({**cls().to_dict(), **{key: value for key, value in SIZES.items() if key in cls().to_dict()}})
    arrays = {name: engine.to_numpy(one).copy() for name, one in engine.tensors(model).items()}
    model.set_dtype(mx.bfloat16)
    with pytest.raises(qkit.ArtifactError, match="cast the model"):
        engine.fill(model, arrays)
