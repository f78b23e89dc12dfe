"""Whole models on MLX: attention, tied heads, and what coverage lists as left alone."""

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
INT4 = Grid("int4", 32)
LINEAR = Rule(("*",), weight=INT4)
EMBEDDING = Rule(("*",), kind="embedding", weight=INT4)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)


class Everything(nn.Module):
    """A weight of every kind."""

    def __init__(self):
        super().__init__()
        switch_layers = pytest.importorskip("mlx_lm.models.switch_layers")
        self.linear = nn.Linear(64, 32)
        self.conv = nn.Conv2d(3, 8, 3)
        self.experts = switch_layers.SwitchLinear(64, 32, num_experts=4, bias=True)
        self.theirs = switch_layers.SwitchLinear(64, 32, num_experts=4, bias=False).to_quantized(32, 4)
        self.lstm = nn.LSTM(8, 16)
        self.norm = nn.LayerNorm(64)
        self.table = mx.zeros((4, 64))
        self.nested = {"deep": [mx.zeros((2, 3)), mx.zeros((5,))]}
        self.steps = mx.zeros((2, 2), mx.int32)
        self._hidden = mx.zeros((7, 7))


def test_every_weight_that_no_rule_speaks_of_is_listed_as_left_alone():
    mx.random.seed(0)
    model = Everything()
    others = {
        "table": (4, 64),
        "nested.deep.0": (2, 3),
        "conv.weight": (8, 3, 3, 3),
        "experts.weight": (4, 32, 64),
        "theirs.weight": (4, 32, 64),
        "lstm.Wx": (64, 8),
        "lstm.Wh": (64, 16),
    }
    stages = [lambda m: m, lambda m: qkit.prepare(m, Recipe("test", (LINEAR,))), qkit.convert]
    for stage in stages:
        model = stage(model)
        rows = {row.path: row for row in qkit.coverage(model).rows}
        assert {path: row.shape for path, row in rows.items() if row.kind == "other"} == others
        assert all(rows[path].state.startswith("left alone: ") for path in others)
        assert set(rows) == {"linear", *others}
    assert "SwitchLinear" in rows["experts.weight"].state
    assert "quantized by MLX already" in rows["theirs.weight"].state
    assert rows["theirs.weight"].bits == 4
    assert rows["conv.weight"].bits == 32
    assert {layer.path for layer in BE.layers(model) if layer.kind == "other"} <= set(BE.tensors(model))


def test_a_subclass_of_linear_is_an_obstacle_and_its_other_arrays_are_listed():
    class Special(nn.Linear):
        pass

    layer = Special(64, 32)
    layer.table = mx.zeros((2, 2))
    model = nn.Sequential(layer)
    assert [(row.path, row.kind) for row in BE.layers(model)] == [
        ("layers.0", "linear"),
        ("layers.0.table", "other"),
    ]
    with pytest.raises(qkit.RecipeError, match="subclass of Linear"):
        qkit.prepare(model, Recipe("test", (LINEAR,)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_attention_computes_with_quantized_weights_in_all_four_projections(training):
    mx.random.seed(0)
    x = mx.random.normal((2, 5, 64))
    plain = nn.MultiHeadAttention(64, 4, bias=True)
    rounded = nn.MultiHeadAttention(64, 4, bias=True)
    rounded.update(plain.parameters())
    for layer in BE.layers(rounded):
        layer.module.weight = BE.fake_quantize(layer.module.weight, INT4)
    model = qkit.prepare(plain, Recipe("test", (LINEAR,)))
    assert {layer.path for layer in BE.layers(model) if layer.stage == "prepared"} == {
        "query_proj",
        "key_proj",
        "value_proj",
        "out_proj",
    }
    model.train(training)
    found, want = BE.to_numpy(model(x, x, x)), BE.to_numpy(rounded(x, x, x))
    assert np.abs(found - want).max() <= (0 if training else 1e-6) * np.abs(want).max()  # another order of sums
    gradients = nn.value_and_grad(model, lambda x: model(x, x, x).square().sum())(x)[1]
    for layer in BE.layers(model):
        assert mx.abs(gradients[layer.path]["weight"]).sum() > 0
        qkit.disable(model, layer.path)
        assert not equal(model(x, x, x), BE.from_numpy(found)), layer.path
        qkit.enable(model)


def tied(name="mlx"):
    pytest.importorskip("mlx_lm")
    return build(name, tie_word_embeddings=True)


def test_a_tied_head_stays_tied_through_training_conversion_saving_and_loading(tmp_path):
    model = qkit.prepare(tied(), Recipe("test", (LINEAR, EMBEDDING)))
    paths = {layer.path for layer in BE.layers(model)}
    assert "model.embed_tokens" in paths
    assert "lm_head" not in paths
    before = BE.to_numpy(model.model.embed_tokens.weight)
    trainer = BE.trainer(model, TrainerOptions(weight_decay=0.0))
    for _ in range(2):
        trainer.step([TOKENS], learning_rate=1e-3)
    assert not np.array_equal(BE.to_numpy(model.model.embed_tokens.weight), before)
    want = BE.logits(model, TOKENS)
    with qkit.disabled(model):
        assert not np.array_equal(BE.logits(model, TOKENS), want)
    converted = qkit.convert(model)
    assert np.array_equal(BE.logits(converted, TOKENS), want)
    qkit.save(converted, tmp_path / "out")
    for opened in (
        qkit.load(tmp_path / "out", backend="mlx"),
        qkit.load(tmp_path / "out", into=tied()),
    ):
        assert np.array_equal(BE.logits(opened, TOKENS), want)
        assert not qkit.coverage(opened).rows[0].tied  # one module: its `as_linear` is the head


def test_the_gradient_of_a_tied_weight_is_that_of_both_its_uses():
    """As in the float model with the rounded weight in its place."""
    plain = tied()
    plain.model.embed_tokens.weight = BE.fake_quantize(plain.model.embed_tokens.weight, INT4)
    model = qkit.prepare(tied(), Recipe("test", (EMBEDDING,)))
    slopes = [
        nn.value_and_grad(m, lambda t, m=m: m(t).square().mean())(mx.array(TOKENS))[1]["model"]["embed_tokens"][
            "weight"
        ]
        for m in (plain, model)
    ]
    want, found = (BE.to_numpy(slope) for slope in slopes)
    assert np.abs(found - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("source", ["mlx", "torchao"])
def test_a_tied_model_opens_on_the_other_engine(source, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    target = {"mlx": "torchao", "torchao": "mlx"}[source]
    model = qkit.convert(tied(source), Recipe("test", (LINEAR, EMBEDDING)))
    qkit.save(model, tmp_path / "out")
    opened = qkit.load(tmp_path / "out", backend=target)
    want = qkit.backend(source).logits(model, TOKENS)
    assert (
        np.abs(qkit.backend(target).logits(opened, TOKENS) - want).max() <= 1e-5 * np.abs(want).max()
    )  # order of sums
    codes = [
        {
            layer.path: BE_.to_numpy(BE_.unpack(layer.module).codes)
            for layer in BE_.layers(m)
            if layer.stage == "converted" and not layer.tied
        }
        for BE_, m in ((qkit.backend(source), model), (qkit.backend(target), opened))
    ]
    assert codes[0].keys() == codes[1].keys()
    assert all(np.array_equal(codes[0][path], codes[1][path]) for path in codes[0])
