"""Adapters in MLX: the merged weight of a large layer is computed in blocks of rows, with the same bits and little memory."""

from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from qkit_mlx.layers import adapted_product  # noqa: E402

import qkit  # noqa: E402
from qkit.testing.read_tensors import read_tensor  # noqa: E402

RECIPES = ["int4-g32", "int3-g32", "mxfp4-a16", "nvfp4-a16"]
WIDTH, PAIRS = 512, 4


def adapted(base, recipe, kind, *, dithered, scales=None):
    """A layer of 70 rows, which 16 blocks do not divide, with an adapter whose B is not zero."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 70))
    own = "int4-g32" if base == "read" else recipe
    model = qkit.prepare(model, own) if base == "prepared" else qkit.convert(model, own)
    if base == "read":
        (layer,) = qkit.backend("mlx").layers(model)
        model.layers[0] = qkit.backend("mlx").pack(layer.module, *read(recipe, layer.rule))
    model = qkit.adapt(model, qkit.Adapter(rank=4, kind=kind, scales=scales))
    (layer,) = model.layers
    if "lora_gains" in layer:
        layer.lora_gains = mx.random.normal(layer.lora_gains.shape) * 0.1
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
    layer.lora_dithered = dithered
    model.train()
    return model


def read(grid, rule):
    """A weight of that layer on a read grid, and its rule."""
    q = read_tensor(qkit.Grid.parse(grid), "float32", "float16")
    random = np.random.default_rng(7)
    parts = {name: np.resize(one, (70, one.shape[-1] // 2)) for name, one in q.parts().items() if one.ndim}
    for name, one in parts.items():  # scales of the size of a model's
        if one.dtype == np.float16:
            parts[name] = (random.standard_normal(one.shape) * 0.1).astype(np.float16)
        elif name == "scales":
            parts[name] = random.integers(120, 126, one.shape).astype(np.uint8)
    q = replace(q, **parts)
    return q.map(qkit.backend("mlx").from_numpy), replace(rule, weight=q.grid)


def outcome(model):
    """The output, and the gradients of the factors."""
    x = mx.random.normal((3, 64), key=mx.random.key(1))
    gradients = nn.value_and_grad(model, lambda x: model(x).square().sum())(x)[1]
    return {"y": np.array(model(x)), **{name: np.array(one) for name, one in tree_flatten(gradients)}}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("base", "dithered"), [("prepared", False), ("converted", False), ("converted", True)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_of_rows_change_no_bit(monkeypatch, recipe, base, dithered, kind):
    want = outcome(adapted(base, recipe, kind, dithered=dithered))
    monkeypatch.setattr(adapted_product, "LARGE", 1)
    found = outcome(adapted(base, recipe, kind, dithered=dithered))
    assert want.keys() == found.keys()
    for name, one in want.items():
        assert np.array_equal(found[name], one), name


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize(
    ("base", "name", "scales"),
    [
        ("converted", "int4-g32", "learned"),
        *(("read", f"int4-g32-{kind}", "learned") for kind in ("affine", "stored", "stored-zeros")),
        ("read", "e2m1-g32-stored-e8m0", "stored"),
        ("read", "e4m3-g32-stored", "learned"),
    ],
)
def test_nor_where_scales_are_those_of_a_file_or_learned(monkeypatch, base, name, scales, off):
    made = []
    for large in (adapted_product.LARGE, 1):
        monkeypatch.setattr(adapted_product, "LARGE", large)
        model = adapted(base, name, "lora", dithered=True, scales=scales)
        if off:
            qkit.backend("mlx").switch_mode(model.layers[0], "off")
        made.append(outcome(model))
    assert made[0].keys() == made[1].keys()
    for part, one in made[0].items():
        assert np.array_equal(made[1][part], one), part


class Pairs(nn.Module):
    """Eight layers of one million weights each."""

    def __init__(self):
        super().__init__()
        sizes = [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * PAIRS
        self.layers = [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes]

    def __call__(self, x):
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + down(nn.relu(up(x)))
        return x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("base", "kind", "scales", "recipe"),
    [
        ("prepared", "lora", "stored", "int4-g32"),
        ("converted", "lora", "stored", "int4-g32"),
        ("converted", "dora", "stored", "int4-g32"),
        ("converted", "lora", "learned", "int4-g32"),
        ("converted", "lora", "learned", "int2-g32"),  # with twice as many columns
    ],
)
def test_no_merged_weight_waits_for_the_backward_pass(base, kind, scales, recipe, compiled):
    model = (qkit.prepare if base == "prepared" else qkit.convert)(Pairs(), recipe)
    model = qkit.adapt(model, qkit.Adapter(rank=16, kind=kind, scales=scales))
    model.train()
    optimizer = optim.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())
    gradient = nn.value_and_grad(model, lambda x: model(x).square().mean())

    def update(x):
        value, slopes = gradient(x)
        optimizer.update(model, slopes)
        return value

    state = [model.state, optimizer.state]
    step = mx.compile(update, inputs=state, outputs=state) if compiled else update
    x = mx.random.normal((16, WIDTH))
    mx.eval(x, state)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(x), state)
    weights = 6 if scales == "stored" else 7  # scales that train: the codes stand beside their values
    assert mx.get_peak_memory() - before < weights * 4 * 4 * WIDTH * WIDTH  # each of the model's eight has values
