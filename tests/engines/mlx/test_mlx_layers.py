"""The MLX engine: what stays exact under casts and edits, what is trained, and models that open as torch saved them."""

from functools import partial

import models
import numpy as np
import pytest
from alike import equal
from models import build

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402
from qkit.engines.trainer import TrainerOptions  # noqa: E402

BE = qkit.backend("mlx")
inputs = partial(models.inputs, "mlx")
GRIDS = [
    Grid("int4", 32),
    Grid("int4", 32, "minmax"),
    Grid("int3", "row"),
    Grid("int4", 16),
    Grid("e2m1", 32),
    Grid("e2m1", 16, "nvfp4"),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu_pytorch_tanh"}  # the one that mlx-lm computes
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}
MODELS = {
    "theta": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic": {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": LLAMA3},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "gemma3": {
        **GEMMA,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
        },
    },
}


def layers(kind=nn.Linear):
    mx.random.seed(0)
    return nn.Sequential(kind(64, 96), kind(96, 64)) if kind is nn.Linear else nn.Sequential(kind(96, 64))


def whole(config):
    """The configuration with everything that transformers knows of it, as the torch engine saves it."""
    transformers = pytest.importorskip("transformers")
    known = transformers.AutoConfig.for_model(**{**SIZES, **config}).to_dict()
    return {**known, "dtype": "float32"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_saved_from_torch_has_its_rotary_embedding(name, tmp_path):
    torch = pytest.importorskip("torch")
    torchao = qkit.backend("torchao")
    config = whole(MODELS[name])
    torch.manual_seed(0)
    model = torchao.build(config)
    tokens = np.random.default_rng(0).integers(1, 256, (2, 24)).astype(np.int32)
    qkit.save(model, tmp_path / "out")
    want = torchao.logits(model, tokens)
    opened = qkit.load(tmp_path / "out", backend="mlx")
    assert np.abs(BE.logits(opened, tokens) - want).max() <= 1e-5 * np.abs(want).max()  # sums in another order
    opened = BE.build(config)  # all of the configuration, None and all
    BE.fill(opened, {key: torchao.to_numpy(tensor) for key, tensor in torchao.tensors(model).items()})
    assert np.abs(BE.logits(opened, tokens) - want).max() <= 1e-5 * np.abs(want).max()  # sums in another order


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_gpt_neox_has_its_rotary_embedding_and_its_activation(activation):
    pytest.importorskip("torch")
    torchao = qkit.backend("torchao")
    rope = {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}
    config = whole({**NEOX, "hidden_act": activation, "rope_parameters": rope})
    model = torchao.build(config)
    tokens = np.random.default_rng(0).integers(1, 256, (2, 24)).astype(np.int32)
    arrays = {key: torchao.to_numpy(tensor) for key, tensor in torchao.tensors(model).items()}
    opened = BE.build(config)
    BE.fill(opened, arrays)
    want = torchao.logits(model, tokens)
    assert np.abs(BE.logits(opened, tokens) - want).max() <= 1e-5 * np.abs(want).max()  # sums in another order


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "'spiral'"),
        ({**NEOX, "layer_norm_eps": 1e-5, "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "'llama3'"),
        (
            {
                "model_type": "llama",
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
            "a part of them",
        ),
        ({"model_type": "phi3", "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}, "llama3"),
        ({"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": "spiral"}}, "'spiral'"),
        ({**NEOX, "rotary_emb_base": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ],
)
def test_a_rotary_embedding_that_mlx_lm_lacks_is_refused(config, message):
    with pytest.raises(qkit.BackendError, match=message):
        BE.build({**SIZES, **config})


def test_building_leaves_the_configuration_alone():
    config = {
        **SIZES,
        "rms_norm_eps": 1e-5,
        "model_type": "llama",
        "rope_parameters": dict(LLAMA3),
        "rope_scaling": None,
    }
    assert BE.config(BE.build(config)) == config
    assert config["rope_parameters"] == LLAMA3


@pytest.mark.parametrize("cast", ["set_dtype", "apply"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_stay_as_they_are_when_the_model_is_cast(grid, cast):
    model = qkit.convert(layers(), Recipe("test", (Rule(("*",), weight=grid),)))
    before = [BE.unpack(layer.module) for layer in BE.layers(model)]
    if cast == "set_dtype":
        model.set_dtype(mx.bfloat16)
    else:
        model.apply(lambda array: array.astype(mx.bfloat16) if mx.issubdtype(array.dtype, mx.floating) else array)
    for old, layer in zip(before, BE.layers(model), strict=True):
        new = BE.unpack(layer.module)
        assert old.parts().keys() == new.parts().keys()
        assert all(equal(old.parts()[part], new.parts()[part]) for part in old.parts())
    assert model.layers[0].bias.dtype == mx.bfloat16
    assert model(inputs().astype(mx.bfloat16)).dtype == mx.bfloat16
    assert model(inputs()).dtype == mx.float32


def test_an_embedding_gives_the_type_it_was_cast_to():
    model = qkit.convert(layers(nn.Embedding), Recipe("test", (Rule(("*",), kind="embedding", weight=GRIDS[0]),)))
    exact = model(mx.array([3]))
    model.set_dtype(mx.bfloat16)
    assert model(mx.array([3])).dtype == mx.bfloat16
    assert equal(model(mx.array([3])), exact.astype(mx.bfloat16))


def test_other_scales_in_half_precision_are_refused():
    model = qkit.convert(layers(), Recipe("test", (Rule(("*",), weight=GRIDS[0]),)))
    with pytest.raises(qkit.StageError, match="float32"):
        model.layers[0].update({"scales": (model.layers[0].scales * 2).astype(mx.bfloat16)})


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_an_edit_in_place_is_seen_in_evaluation(kind):
    rule = Rule(("*",), kind=kind.__name__.lower(), weight=Grid("int4", 32))
    model = qkit.prepare(layers(kind), Recipe("test", (rule,)))
    x = inputs() if kind is nn.Linear else mx.arange(96)
    model.eval()
    before = model(x)
    model.layers[0].weight[0:96] = model.layers[0].weight[0:96] * -2
    after = model(x)
    assert not equal(after, before)
    assert equal(after, qkit.convert(model)(x))


def test_both_trainers_take_the_same_steps():
    pytest.importorskip("torch")
    tokens = np.random.default_rng(3).integers(0, 256, (2, 17)).astype(np.int32)
    ends = []
    for name in ("torchao", "mlx"):
        engine = qkit.backend(name)
        model = build(name)
        start = {key: engine.to_numpy(array).copy() for key, array in engine.tensors(model).items()}
        trainer = engine.trainer(model, TrainerOptions(weight_decay=0.5))
        for i in range(4):
            trainer.step([tokens * (i + 1) % 256], learning_rate=1e-2)
        ends.append({key: engine.to_numpy(array) - start[key] for key, array in engine.tensors(model).items()})
    for key, moved in ends[0].items():
        # two libraries sum gradients in another order, and Adam's first steps divide by them
        assert np.linalg.norm(ends[1][key] - moved) <= 1e-4 * np.linalg.norm(moved), key


@pytest.mark.parametrize("given", ["bfloat16", "float16"])
def test_filling_casts_up_and_keeps_the_type_of_the_model(given):
    from ml_dtypes import bfloat16

    model = layers()
    half = {
        name: BE.to_numpy(array).astype({"bfloat16": bfloat16, "float16": np.float16}[given])
        for name, array in BE.tensors(model).items()
    }
    BE.fill(model, half)
    for name, array in BE.tensors(model).items():
        assert array.dtype == mx.float32
        assert np.array_equal(BE.to_numpy(array), half[name].astype(np.float32))


@pytest.mark.parametrize(
    ("held", "given"),
    [(mx.bfloat16, np.float32), (mx.bfloat16, np.float16), (mx.float32, np.int32), (mx.float32, np.float64)],
)
def test_filling_with_another_type_is_refused_before_anything_is_written(held, given):
    model = layers()
    model.set_dtype(held)
    before = BE.tensors(model)
    last = list(before)[-1]
    arrays = {name: BE.to_numpy(array) + 1 for name, array in before.items()}
    arrays = {name: array.astype(BE.to_numpy(before[name]).dtype) for name, array in arrays.items()}
    arrays[last] = arrays[last].astype(given)
    with pytest.raises(
        qkit.ArtifactError, match=rf"{last} is .*{np.dtype(given).name}.*{str(held).rpartition('.')[2]}"
    ):
        BE.fill(model, arrays)
    assert all(before[name] is array for name, array in BE.tensors(model).items())


def test_choosing_a_device_never_changes_that_of_the_process():
    before = mx.default_device()
    kind = before.type.name
    assert BE.on(kind) is BE
    other = "cpu" if kind == "gpu" else "cuda"
    with pytest.raises(qkit.BackendError, match=r"mx\.set_default_device"):
        BE.on(other)
    assert mx.default_device() == before


def test_layers_that_mlx_quantized_are_listed_with_an_obstacle():
    model = layers()
    nn.quantize(model, group_size=32, bits=4)
    assert all("quantized by MLX already" in layer.obstacle for layer in BE.layers(model))
