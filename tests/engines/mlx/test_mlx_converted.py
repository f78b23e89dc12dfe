"""Converted layers of MLX: under mx.compile, with NaN in their input, and what their coverage says; biases before that."""

from functools import partial

import models
import numpy as np
import pytest
from alike import equal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")
optim = pytest.importorskip("mlx.optimizers")

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402
from qkit.testing.hard_tensors import random  # noqa: E402

BE = qkit.backend("mlx")
inputs = partial(models.inputs, "mlx")
INT4 = Grid("int4", 32)
INT8 = Grid("int8", "row")
MXFP4, MXFP8, NVFP4 = Grid("e2m1", 32), Grid("e4m3", 32), Grid("e2m1", 16, "nvfp4")
FIXED = [Grid("int8", "tensor"), Grid("int8", "tensor", "minmax"), Grid("e4m3", "tensor")]
RULES = {
    "int4": Rule(("*",), weight=INT4),
    "int4 minmax": Rule(("*",), weight=Grid("int4", 32, "minmax")),
    "int8 row": Rule(("*",), weight=INT8),
    "mxfp4": Rule(("*",), weight=MXFP4),
    "mxfp8": Rule(("*",), weight=MXFP8),
    "nvfp4": Rule(("*",), weight=NVFP4),
    "decoded int4": Rule(("*",), weight=Grid("int4", 16)),
    "decoded e5m2": Rule(("*",), weight=Grid("e5m2", "row")),
    "int4, int8 row": Rule(("*",), weight=INT4, activation=INT8),
    "int8 row, int8 row minmax": Rule(("*",), weight=INT8, activation=Grid("int8", "row", "minmax")),
    "e4m3 row, e4m3 row": Rule(("*",), weight=Grid("e4m3", "row"), activation=Grid("e4m3", "row")),
    "mxfp4, mxfp4": Rule(("*",), weight=MXFP4, activation=MXFP4),
    "mxfp8, mxfp8": Rule(("*",), weight=MXFP8, activation=MXFP8),
    "nvfp4, nvfp4": Rule(("*",), weight=NVFP4, activation=NVFP4),
    "int4 -> int8 row": Rule(("*",), weight=INT4, output=INT8),
    **{f"int8, static {grid}": Rule(("*",), weight=INT8, activation=grid, range="calibrated") for grid in FIXED},
    **{f"int4 -> static {grid}": Rule(("*",), weight=INT4, output=grid, range="calibrated") for grid in FIXED},
}

each_rule = pytest.mark.parametrize("name", RULES)


def prepared(name):
    """A prepared, calibrated model, in evaluation mode."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    model = qkit.prepare(model, Recipe("test", (RULES[name],)))
    if RULES[name].range != "dynamic":
        with qkit.calibrating(model):
            model(inputs())
    model.eval()
    return model


@each_rule
def test_compiled_equals_eager(name):
    model = prepared(name)
    compiled = mx.compile(lambda x: model(x), inputs=[model.state], outputs=[model.state])
    assert equal(compiled(inputs()), model(inputs()))
    model = qkit.convert(model)
    compiled = mx.compile(lambda x: model(x))
    for dtype in ("float32", "bfloat16"):
        assert equal(compiled(inputs(dtype=dtype)), model(inputs(dtype=dtype))), dtype


@each_rule
def test_prepared_equals_converted(name):
    model = prepared(name)
    wants = [model(inputs(dtype=dtype)) for dtype in ("float32", "bfloat16")]
    model = qkit.convert(model)
    for want, dtype in zip(wants, ("float32", "bfloat16"), strict=True):
        assert equal(model(inputs(dtype=dtype)), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.slots])
def test_nan_in_an_activation_reaches_the_output(name, value):
    """The row's; or every row's, where one scale looks at all of them."""
    model = prepared(name)
    x = inputs()
    x[2, 7] = value
    grid = next(iter(RULES[name].slots.values()))
    coupled = RULES[name].range == "dynamic" and grid.scale == "nvfp4"
    layers = [prepared(name).layers[0].train(), model.layers[0], qkit.convert(model).layers[0]]
    for layer in layers:
        y = BE.to_numpy(layer(x))
        assert np.isnan(y[2]).all()
        assert np.isnan(y[[0, 1, 3, 4]]).all() == coupled
        assert np.isnan(y[[0, 1, 3, 4]]).any() == coupled


@pytest.mark.parametrize(
    ("name", "native", "execution"),
    [
        ("int4", True, "QuantizedLinear, affine 4-bit g32"),
        ("int8 row", True, "QuantizedLinear, affine 8-bit, row scale repeated at g"),
        ("mxfp8", True, "QuantizedLinear, mxfp8 g32"),
        ("nvfp4", True, "QuantizedLinear, nvfp4 g16"),
        ("decoded int4", False, "MLX has no container for int4-g16-signed"),
    ],
)
def test_coverage_says_how_a_layer_runs(name, native, execution):
    model = qkit.convert(prepared(name))
    layer = next(iter(BE.layers(model)))
    assert layer.native is native
    assert layer.execution.startswith(execution)
    state = qkit.coverage(model).rows[0].state
    assert state == f"{'native' if native else 'decoded first'}: {layer.execution}"


def test_an_embedding_runs_natively():
    model = qkit.convert(
        nn.Sequential(nn.Embedding(96, 64)), Recipe("e", (Rule(("*",), kind="embedding", weight=INT4),))
    )
    assert qkit.coverage(model).rows[0].state == "native: QuantizedEmbedding, affine 4-bit g32"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["int4", "int4, int8 row", "decoded int4"])
def test_a_bias_is_trained_and_kept(name, training):
    """Its gradient is that of a float layer with the rounded weight and input: here, of what comes back."""
    rule = RULES[name]
    layer = prepared(name).layers[0].train(training)
    plain = nn.Linear(64, 96)
    plain.weight, plain.bias = BE.fake_quantize(layer.weight, rule.weight), layer.bias
    x = inputs()
    rounded = BE.fake_quantize(x, rule.activation) if rule.activation else x
    slope = BE.from_numpy(random((5, 96), 3))
    found = nn.value_and_grad(layer, lambda x: (layer(x) * slope).sum())(x)[1]["bias"]
    want = nn.value_and_grad(plain, lambda x: (plain(x) * slope).sum())(rounded)[1]["bias"]
    assert equal(found, want)
    assert mx.abs(found).min() > 0
    optimizer = optim.SGD(0.1)
    before = layer.bias
    optimizer.update(layer, {"bias": found})
    assert not equal(layer.bias, before)
    assert equal(qkit.convert(layer).bias, layer.bias)


def test_a_container_without_a_kernel_is_named():
    from qkit_mlx.layers.execution import try_kernel, why_no_kernel

    from qkit.formats.mlx_lm import Container

    assert why_no_kernel(Container("affine", 4, 64), mx.float32, device=mx.Device(mx.cpu, 0), shape=(32, 128)) == ""
    assert try_kernel(Container("affine", 4, 64), mx.float32, (32, 128), "here") == ""
    said = try_kernel(Container("affine", 4, 48), mx.float32, (32, 96), "here")
    assert said.startswith("MLX has no kernel for it on here: ")
