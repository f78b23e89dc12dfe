"""Adapters in MLX: gradients, compiled steps, casts, and what mlx-lm's layers compute."""

import numpy as np
import pytest
from models import build

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import qkit  # noqa: E402
from qkit.adapters import Adapter  # noqa: E402

BASES = ["prepared", "converted"]


def adapted(*, base, kind="lora", recipe="int4-g32", dtype=mx.float32):
    """Two layers with adapters whose B is not zero."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    model.set_dtype(dtype)
    model = qkit.prepare(model, recipe) if base == "prepared" else qkit.convert(model, recipe)
    model = qkit.adapt(model, Adapter(rank=4, kind=kind))
    for layer in model.layers[::2]:
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    return model


def slopes(model, x, loss=lambda y: y.square().sum()):
    """The gradient of every trainable array by name."""
    return dict(tree_flatten(nn.value_and_grad(model, lambda x: loss(model(x).astype(mx.float32)))(x)[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_pass_straight_through_to_the_adapter(kind, base, training):
    model = adapted(base=base, kind=kind)
    layer, x = model.layers[0], mx.random.normal((8, 64))
    layer.train(training)
    engine = qkit.backend("mlx")
    (known,) = engine.layers(layer)
    w = mx.array(next(qkit.adapters.surgery.base_weights(engine, known, "weight", spread=known.stage == "converted")))
    values = engine.fake_quantize(layer.merged(), layer.rule.weight)

    def plain(trained):
        v = w + layer.lora_scale * (trained["lora_a"] @ trained["lora_b"]).T
        if "m" in trained:
            v = trained["m"][:, None] * v / mx.stop_gradient(mx.linalg.norm(v, axis=1, keepdims=True))
        return (x @ (v + mx.stop_gradient(values - v)).T + layer.bias).square().sum()

    want, got = mx.grad(plain)(layer.trainable_parameters()), slopes(layer, x)
    assert set(got) == {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    for name in want:  # factors have 12 bits
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2**-11 * float(mx.abs(want[name]).max()))


@pytest.mark.parametrize("base", BASES)
def test_a_compiled_step_trains_the_adapter_as_an_eager_one(base):
    def train(compiled):
        model, x = adapted(base=base, kind="dora"), mx.random.normal((8, 64))
        optimizer = optim.SGD(1e-3)
        state = [model.state, optimizer.state]

        def step(x):
            loss, gradients = nn.value_and_grad(model, lambda x: model(x).square().sum())(x)
            optimizer.update(model, gradients)
            return loss

        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        for _ in range(2):
            mx.eval(run(x), state)
        return dict(tree_flatten(model.trainable_parameters()))

    eager, compiled = train(False), train(True)
    for name in eager:  # sums in another order
        np.testing.assert_allclose(compiled[name], eager[name], rtol=0, atol=1e-6 * float(mx.abs(eager[name]).max()))


@pytest.mark.parametrize("base", BASES)
def test_a_cast_model_merges_what_it_computes(base):
    model, x = adapted(base=base), mx.random.normal((8, 64)).astype(mx.bfloat16)
    model.set_dtype(mx.bfloat16)
    model.eval()
    y = model(x)
    assert y.dtype == mx.bfloat16
    assert mx.array_equal(qkit.merge(model)(x), y)


def test_an_unfrozen_model_keeps_a_bias_that_trains_by_wish():
    model = adapted(base="prepared")
    assert "0.bias" not in {name.removeprefix("layers.") for name, _ in tree_flatten(model.trainable_parameters())}
    model.layers[0].unfreeze(keys=["bias"])
    assert "layers.0.bias" in dict(tree_flatten(model.trainable_parameters()))


def test_a_merge_by_mlx_lm_moves_the_loss_and_ours_does_not():
    """mlx-lm's fuse quantizes the merged weight by MLX's own rule; the layer that was trained is another."""
    from mlx_lm.tuner.lora import LoRALinear

    mx.random.seed(0)
    x = mx.random.normal((64, 64))
    theirs = LoRALinear.from_base(nn.QuantizedLinear.from_linear(nn.Linear(64, 96), 32, 4), r=4, scale=2.0)
    theirs.lora_b = mx.random.normal(theirs.lora_b.shape) * 0.1
    assert float(mx.abs(theirs.fuse()(x) - theirs(x)).max()) > 1e-3
    ours = adapted(base="converted")
    ours.eval()
    before = ours(x)
    assert mx.array_equal(qkit.merge(ours)(x), before)


def test_a_llama_is_adapted_where_it_is_asked():
    model = qkit.adapt(qkit.convert(build("mlx"), "int4-g64"), Adapter(match=("*.q_proj",), norms="stored"))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert sorted(names) == sorted(f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in range(2) for x in "ab")
