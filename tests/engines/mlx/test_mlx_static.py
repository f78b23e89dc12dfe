"""Static activations, gates and outputs of MLX's layers: what is recorded, when, and what convert makes of it."""

from dataclasses import replace
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
from qkit.element import AVERAGE  # noqa: E402

BE = qkit.backend("mlx")
inputs = partial(models.inputs, "mlx")
INT4 = Grid("int4", 32)
STATIC = [Grid("int8", "tensor"), Grid("int8", "tensor", "minmax"), Grid("e4m3", "tensor")]
INF = float("inf")

each_static = pytest.mark.parametrize("grid", STATIC, ids=str)


def rule(grid=None, **more):
    return Rule(("*",), weight=INT4, activation=grid, **more)


def prepared(*rules):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    return qkit.prepare(model, Recipe("test", rules))


def ranges(model):
    return {name: BE.to_numpy(array) for name, array in BE.tensors(model).items() if name.endswith("_range")}


@each_static
def test_calibrating_records_extremes_of_float_activations(grid):
    model = prepared(rule(grid, output=grid, range="calibrated"))
    model.eval()
    first, relu, last = model.layers
    with qkit.calibrating(model):
        assert [layer.mode for layer in BE.layers(model)] == ["calibrating"] * 2
        for seed in (1, 2):
            model(inputs(seed=seed))
    x = mx.concatenate([inputs(seed=1), inputs(seed=2)])
    w = BE.fake_quantize(first.weight, INT4)
    between = relu(mx.addmm(first.bias, x, w.T))
    out = mx.addmm(last.bias, between, BE.fake_quantize(last.weight, INT4).T)
    for name, seen in (("0.input", x), ("2.input", between), ("2.output", out)):
        want = [BE.to_numpy(seen).min(), BE.to_numpy(seen).max()]
        path, _, slot = name.partition(".")
        found = ranges(model)[f"layers.{path}.{slot}_range"]
        assert np.allclose(found, want, rtol=1e-6), name  # the same products, in batches of another size


@each_static
@pytest.mark.parametrize("slot", ["activation", "output"])
def test_a_calibrated_model_converts_to_what_it_was_evaluated_as(grid, slot, tmp_path):
    model = prepared(Rule(("*",), weight=INT4, **{slot: grid}, range="calibrated"))
    model.eval()
    with qkit.calibrating(model):
        model(inputs())
    x = inputs(seed=3) * 2  # some of it is clipped
    evaluated = model(x)
    names = {f"layers.{i}.{ {'activation': 'input'}.get(slot, slot) }_range" for i in (0, 2)}
    assert names == set(ranges(model))
    scales = {
        name: BE.to_numpy(BE.fake_quantize(BE.from_numpy(np.float32([[*known]])), grid))
        for name, known in ranges(model).items()
    }
    assert all(np.isfinite(values).all() for values in scales.values())
    model = qkit.convert(model)
    assert equal(model(x), evaluated)
    kinds = {name: str(array.dtype).rpartition(".")[2] for name, array in BE.tensors(model).items() if "scale" in name}
    assert set(kinds.values()) == {"float32"}
    assert len(kinds) == 2
    assert sum("zero_point" in name for name in BE.tensors(model)) == (0 if grid.symmetric else 2)
    assert not model.trainable_parameters()["layers"][0]
    qkit.save(model, tmp_path / "out")
    fresh = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    assert equal(qkit.load(tmp_path / "out", into=fresh)(x), evaluated)
    model.set_dtype(mx.bfloat16)
    assert {str(a.dtype) for name, a in BE.tensors(model).items() if "scale" in name} == {"mlx.core.float32"}


@each_static
def test_a_static_layer_computes_with_the_scales_of_its_range(grid):
    model = prepared(rule(grid, range="calibrated"))
    first = model.layers[0]
    first.input_range = mx.array([-1.5, 2.0])
    x = inputs()
    q = BE.quantize(first.input_range, grid)
    from qkit_mlx.arithmetic import rounding

    on_grid = BE.fake_quantize(x, grid, scales=rounding.scale_values(q), zeros=q.zeros)
    want = mx.addmm(first.bias, on_grid, BE.fake_quantize(first.weight, INT4).T)
    assert equal(first(x), want)


@each_static
def test_an_empty_range_gives_no_numbers(grid):
    for slot in ("activation", "output"):
        model = prepared(Rule(("*",), weight=INT4, **{slot: grid}, range="calibrated"))
        for mode in (True, False):
            assert mx.isnan(model.train(mode)(inputs())).all()
        with pytest.raises(qkit.StageError, match="not known yet"):
            qkit.convert(model)


def test_extremes_that_are_not_finite_are_not_recorded():
    model = prepared(rule(STATIC[0], range="calibrated"))
    bad = inputs()
    bad[0, 0] = INF
    with qkit.calibrating(model):
        model(bad)
        assert ranges(model)["layers.0.input_range"].tolist() == [INF, -INF]
        model(inputs())
        model(bad * float("nan"))
    x = BE.to_numpy(inputs())
    assert ranges(model)["layers.0.input_range"].tolist() == [x.min(), x.max()]


def test_calibrating_forgets_what_was_seen_before():
    model = prepared(rule(STATIC[0], range="calibrated"))
    for x in (inputs() * 100, inputs()):
        with qkit.calibrating(model):
            model(x)
    assert ranges(model)["layers.0.input_range"].max() < 10


def test_calibrating_inside_a_compiled_function_is_refused():
    model = prepared(rule(STATIC[0], range="calibrated"))
    with qkit.calibrating(model):
        with pytest.raises(qkit.StageError, match="while a function is compiled"):
            mx.compile(lambda x: model(x))(inputs())
        model(inputs())
    assert all(np.isfinite(known).all() for known in ranges(model).values())


def step_of(model, compiled):
    """One optimizer step on `model`, a function of x; and the optimizer."""
    optimizer = optim.AdamW(1e-2, weight_decay=0.1)
    optimizer.init(model.trainable_parameters())

    def step(x):
        loss, gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())(x)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state]
    return mx.compile(step, inputs=state, outputs=state) if compiled else step


@pytest.mark.parametrize("ste", ["identity", "masked"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_running_average_follows_the_training_steps(compiled, ste):
    model = prepared(rule(STATIC[0], output=STATIC[1], range="average", ste=ste))
    step = step_of(model, compiled)
    want = None
    for seed in range(4):
        x = BE.to_numpy(inputs(seed=seed))
        seen = np.float32([x.min(), x.max()])
        want = seen if want is None else want + np.float32(AVERAGE) * (seen - want)
        loss = step(BE.from_numpy(x))
        mx.eval(loss, model.state)
        assert np.isfinite(loss.item())
    assert np.allclose(ranges(model)["layers.0.input_range"], want, rtol=1e-6)  # a fused product and sum round once
    before = ranges(model)
    model.eval()
    model(inputs(seed=9) * 100)
    assert all(np.array_equal(before[name], known) for name, known in ranges(model).items())
    x = inputs(seed=5)
    evaluated = model(x)
    assert equal(qkit.convert(model)(x), evaluated)


def test_ranges_are_never_trained():
    model = prepared(rule(STATIC[0], range="average"))
    model.freeze()
    model.unfreeze()
    assert not [name for layer in model.trainable_parameters()["layers"] for name in layer if name.endswith("_range")]
    assert set(model.layers[0].trainable_parameters()) == {"weight", "bias"}
    model.layers[0].unfreeze(keys=["input_range"])
    assert "input_range" not in model.layers[0].trainable_parameters()


def test_ranges_stay_float32_when_the_model_is_cast():
    model = prepared(rule(STATIC[0], range="calibrated"))
    with qkit.calibrating(model):
        model(inputs())
    before = ranges(model)
    model.set_dtype(mx.bfloat16)
    assert all(np.array_equal(before[name], known) for name, known in ranges(model).items())
    assert model.layers[0].weight.dtype == mx.bfloat16


def test_ranges_are_stored_with_the_weights(tmp_path):
    model = prepared(rule(STATIC[0], range="calibrated"))
    with qkit.calibrating(model):
        model(inputs())
    model.save_weights(str(tmp_path / "weights.safetensors"))
    other = prepared(rule(STATIC[0], range="calibrated"))
    other.load_weights(str(tmp_path / "weights.safetensors"))
    assert all(np.array_equal(ranges(other)[name], known) for name, known in ranges(model).items())


def test_a_gate_is_no_parameter(tmp_path):
    model = prepared(rule())
    names = {f"layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(BE.tensors(model)) == names
    model.save_weights(str(tmp_path / "weights.safetensors"))
    assert set(mx.load(str(tmp_path / "weights.safetensors"))) == names


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_a_layer_that_is_off_is_the_float_layer(training, dynamic):
    """Its outputs and its gradients, eager and compiled; what was traced while it was on is traced once more, and no more."""
    mx.random.seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    known = rule(STATIC[1], output=STATIC[0], ste="masked", range="dynamic" if dynamic else "average")
    model = prepared(known)
    for name, parameter in BE.tensors(plain).items():
        assert equal(parameter, BE.tensors(model)[name])
    x = inputs()
    model(x)
    model.train(training)
    traces = []

    def forward(x):
        traces.append(x)
        return model(x)

    compiled = mx.compile(forward, inputs=[model.state], outputs=[model.state])
    gradient = nn.value_and_grad(model, lambda x: model(x).square().mean())
    compiled_gradient = mx.compile(gradient, inputs=[model.state], outputs=[model.state])
    on = model(x)
    assert np.allclose(BE.to_numpy(compiled(x)), BE.to_numpy(on), atol=0.05)  # ranges moved one step between
    compiled_gradient(x)
    before = ranges(model)
    with qkit.disabled(model):
        assert [layer.mode for layer in BE.layers(model)] == ["off"] * 2
        want, slopes = nn.value_and_grad(plain, lambda x: plain(x).square().mean())(x)
        for function in (model, compiled):
            assert equal(function(x), plain(x))
        for function in (gradient, compiled_gradient):
            loss, found = function(x)
            assert np.isclose(loss.item(), want.item(), rtol=1e-6)  # sums in another order
            for i in (0, 2):
                for name in ("weight", "bias"):
                    ours, theirs = (BE.to_numpy(tree["layers"][i][name]) for tree in (found, slopes))
                    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max(), name  # a fused kernel
        assert all(np.array_equal(before[name], value) for name, value in ranges(model).items())
    assert len(traces) == 2
    again = compiled(x)
    assert not equal(again, plain(x))
    with qkit.disabled(model):
        assert equal(compiled(x), plain(x))
    assert len(traces) == 2


def test_one_layer_can_be_off():
    model = prepared(rule())
    qkit.disable(model, "layers.0")
    assert [layer.mode for layer in BE.layers(model)] == ["off", "on"]
    assert "switched off" in str(qkit.coverage(model))
    x = inputs()
    assert equal(model.layers[0](x), mx.addmm(model.layers[0].bias, x, model.layers[0].weight.T))
    qkit.enable(model)
    assert [layer.mode for layer in BE.layers(model)] == ["on", "on"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_embedding_can_be_off(training):
    mx.random.seed(0)
    plain = nn.Embedding(96, 64)
    model = qkit.prepare(plain, Recipe("test", (Rule(("*",), kind="embedding", weight=INT4),)))
    model.train(training)
    tokens, x = mx.array([[3, 95]]), inputs()
    look = mx.compile(lambda tokens: model(tokens), inputs=[model.state])
    head = mx.compile(lambda x: model.as_linear(x), inputs=[model.state])
    for function, given in ((look, tokens), (head, x)):
        assert not equal(function(given), plain(tokens) if function is look else plain.as_linear(x))
    with qkit.disabled(model):
        assert equal(model(tokens), plain(tokens))
        assert equal(look(tokens), plain(tokens))
        assert equal(model.as_linear(x), plain.as_linear(x))
        assert equal(head(x), plain.as_linear(x))


@pytest.mark.parametrize("grid", [Grid("int8", "row"), Grid("e4m3", "row"), *STATIC], ids=str)
def test_an_output_is_on_its_grid(grid):
    model = prepared(Rule(("*",), weight=INT4, output=grid))
    model.eval()
    x = inputs()
    plain = qkit.prepare(prepared_float(model), Recipe("test", (rule(),)))
    plain.eval()
    first = model.layers[0](x)
    assert equal(first, BE.fake_quantize(plain.layers[0](x), grid))
    assert equal(qkit.convert(model).layers[0](x), first)


def prepared_float(model):
    """A float model with the weights of `model`."""
    twin = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    BE.fill(twin, {name: BE.to_numpy(array) for name, array in BE.tensors(model).items()})
    return twin


def test_a_masked_gradient_is_zero_where_weights_were_clipped():
    loose, tight = (prepared(replace(rule(), ste=ste)) for ste in ("identity", "masked"))
    x = inputs()
    slopes = [
        BE.to_numpy(nn.value_and_grad(model, lambda x, m=model: m(x).sum())(x)[1]["layers"][2]["weight"])
        for model in (loose, tight)
    ]
    inside = BE.to_numpy(BE.unclipped(loose.layers[2].weight, INT4))
    assert not inside.all()
    assert np.array_equal(slopes[1], slopes[0] * inside)
