"""Norms that train beside adapters on codes: which of them, the same on every engine, and nothing lost by merging."""

import numpy as np
import pytest
from models import build
from safetensors.numpy import load_file, save_file
from tables import BUILDERS as ENGINES

import qkit
from qkit import adapters
from qkit.adapters import Adapter
from qkit.engines.abilities import offers
from qkit.engines.norms import TrainsNorms
from qkit.engines.trainer import TrainerOptions

KNOWN = [name for name in ENGINES if offers(qkit.backend(name), TrainsNorms)]
TOKENS = np.random.default_rng(1).integers(0, 256, (4, 17)).astype(np.int32)
BLOCK = ("input_layernorm", "post_attention_layernorm")
NORMS = {f"model.layers.{block}.{norm}.weight" for block in range(2) for norm in BLOCK} | {"model.norm.weight"}
known_engines = pytest.mark.parametrize("name", KNOWN)


def training(name, *calls, recipe="int4-g64", stage=qkit.convert, **changes):
    """The engine, a Llama with an adapter for each of `calls`, and the names of the norms that train."""
    engine, model = qkit.backend(name), stage(build(name, **changes), recipe)
    for call in calls:
        model = qkit.adapt(model, Adapter(rank=4, **call))
    return engine, model, {norm for norm, trains in engine.norms(model).items() if trains}


def trained(name, **changes):
    """A Llama of codes after three steps."""
    engine, model, _ = training(name, {"alpha": 10.0}, **changes)
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.1))
    for _ in range(3):
        trainer.step([TOKENS], learning_rate=1e-2)
    return engine, model


def floats(engine, model):
    return {norm: engine.to_numpy(engine.tensors(model)[norm]) for norm in engine.norms(model)}


@known_engines
@pytest.mark.parametrize(
    ("stage", "calls", "names"),
    [
        (qkit.convert, [{}], NORMS),
        (qkit.convert, [{"norms": "stored"}], set()),
        (qkit.prepare, [{}], set()),
        (qkit.prepare, [{"norms": "learned"}], NORMS),
        (qkit.convert, [{"match": ("*.layers.1.*",)}], {norm for norm in NORMS if "layers.0" not in norm}),
        (qkit.convert, [{"match": ("*.mlp.*",)}, {"match": ("*.self_attn.*",)}], NORMS),
    ],
)
def test_the_norms_around_layers_with_adapters_train(name, stage, calls, names):
    assert training(name, *calls, stage=stage)[2] == names


@known_engines
def test_a_norm_beside_a_projection_trains_with_it_alone(name):
    changes = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
    inner = {f"model.layers.{block}.self_attn.{norm}_norm.weight" for block in range(2) for norm in "qk"}
    assert training(name, {}, **changes)[2] == NORMS | inner
    assert training(name, {"match": ("*.mlp.*",)}, **changes)[2] == NORMS


@known_engines
def test_norms_in_16_bits_stay_as_they_are(name):
    assert training(name, {}, dtype="bfloat16")[2] == set()


@known_engines
def test_a_merge_leaves_trained_norms_and_the_loss_as_they_are(name):
    engine, model = trained(name)
    loss, norms, before = engine.loss(model, TOKENS), floats(engine, model), floats(engine, build(name))
    model = qkit.merge(model)
    assert engine.loss(model, TOKENS) == loss
    assert all(np.array_equal(norm, floats(engine, model)[key]) for key, norm in norms.items())
    assert all((norm != before[key]).any() for key, norm in norms.items())


@pytest.mark.skipif(len(KNOWN) < 2, reason="one engine only")
def test_engines_take_the_same_steps(tmp_path):
    (one, mine), (other, theirs) = trained("torchao"), trained("mlx")
    found = floats(other, theirs)
    for key, norm in floats(one, mine).items():
        np.testing.assert_allclose(found[key], norm, rtol=0, atol=2e-3)  # Adam makes a share of a step of last bits
    adapters.save(mine, tmp_path)
    opened = adapters.load(training("mlx")[1], tmp_path)
    assert all(np.array_equal(norm, floats(other, opened)[key]) for key, norm in floats(one, mine).items())


@known_engines
@pytest.mark.parametrize("layout", ["peft", "mlx-lm"])
def test_files_of_an_adapter_hold_its_norms(name, layout, tmp_path):
    engine, model = trained(name)
    adapters.save(model, tmp_path, layout=layout)
    opened = adapters.load(training(name)[1], tmp_path)
    assert {norm for norm, trains in engine.norms(opened).items() if trains} == NORMS
    assert np.array_equal(engine.logits(opened, TOKENS), engine.logits(model, TOKENS))


@known_engines
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (None, r"lacks the norm model\.layers\.0\.input_layernorm\.weight, which it was trained with"),
        (lambda norm: norm[1:], r"for another base: its norm model\S+ is \[127\], and the model's is \[128\]"),
        (lambda norm: norm * np.float32("inf"), r"model\S+ holds a NaN or an infinity"),
    ],
)
def test_a_folder_without_the_norms_that_it_was_saved_with_is_refused(name, damage, says, tmp_path):
    adapters.save(trained(name)[1], tmp_path)
    file = tmp_path / "qkit_norms.safetensors"
    held = load_file(file)
    file.unlink()
    if damage:
        save_file({key: np.ascontiguousarray(damage(norm)) for key, norm in held.items()}, file)
    with pytest.raises(qkit.ArtifactError, match=says):
        adapters.load(training(name)[1], tmp_path)


@known_engines
def test_norms_of_another_model_are_refused(name, tmp_path):
    adapters.save(trained(name)[1], tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    metadata = {"qkit": '{"qkit.norms": {"names": ["model.layers.7.input_layernorm.weight"]}}'}
    save_file(names, tmp_path / "adapter_model.safetensors", metadata=metadata)
    save_file({"model.layers.7.input_layernorm.weight": np.ones(128, np.float32)}, tmp_path / "qkit_norms.safetensors")
    with pytest.raises(
        qkit.ArtifactError, match=r"its norm model\.layers\.7\S+ is \[128\], and the model has no such norm"
    ):
        adapters.load(training(name)[1], tmp_path)


def test_a_choice_that_there_is_not_is_refused():
    with pytest.raises(qkit.QkitError, match="adapter norms is 'all': choose one of learned, stored"):
        Adapter(norms="all")
