"""MLX rounds a weight once for as long as it stays the same, and never trains on what a weight was before."""

import copy
import gc
import pickle
import weakref
from functools import partial

import models
import numpy as np
import pytest
from alike import equal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")
optim = pytest.importorskip("mlx.optimizers")

from mlx.utils import tree_map  # noqa: E402
from qkit_mlx.arithmetic import rounding  # noqa: E402
from qkit_mlx.cache import identity  # noqa: E402
from qkit_mlx.cache.values import LastValue  # noqa: E402
from qkit_mlx.kernels import cpu  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402
from qkit.engines.trainer import AdamWOptions  # noqa: E402

BE = qkit.backend("mlx")
inputs = partial(models.inputs, "mlx")
floats = partial(models.mlp, "mlx")
INT4, INT8 = Grid("int4", 32), Grid("int8", "row")


@pytest.fixture
def roundings(monkeypatch):
    """The shape of all that is rounded, in order."""
    seen = []
    for module in (rounding, cpu):

        def spy(w, *args, fake_quantize=module.fake_quantize, **kwargs):
            seen.append(tuple(w.shape))
            return fake_quantize(w, *args, **kwargs)

        monkeypatch.setattr(module, "fake_quantize", spy)
    return seen


def prepared(activation=None, ste="identity"):
    return qkit.prepare(floats(), Recipe("test", (Rule(("*",), weight=INT4, activation=activation, ste=ste),)))


def expected(model, x):
    """What the layers of `prepared` give, every value made here and now."""
    first, relu, last = model.layers
    x = relu(mx.addmm(first["bias"], x, BE.fake_quantize(first["weight"], INT4).T))
    return mx.addmm(last["bias"], x, BE.fake_quantize(last["weight"], INT4).T)


def loss(model, x):
    return model(x).square().mean()


def stepping(model):
    return nn.value_and_grad(model, lambda x: loss(model, x))


# What is the same


def held_by(change):
    x = mx.arange(4.0)
    held = identity.snapshot(x)
    y = change(x)
    return identity.is_snapshot(y, held), bool(identity.is_copy(y, held))


def in_place(x):
    x[1] = 7
    return x


def added(x):
    x += 1
    return x


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x, (True, True)),
        (copy.copy, (True, True)),
        (mx.stop_gradient, (False, True)),
        (in_place, (False, False)),
        (added, (False, False)),
        (lambda x: x * 1, (False, False)),
        (lambda x: x.astype(mx.bfloat16), (False, False)),
        (lambda x: mx.arange(4.0), (False, False)),
        (lambda x: in_place(mx.stop_gradient(x)), (False, False)),
        (lambda x: mx.stop_gradient(in_place(x)), (False, False)),
        (lambda x: mx.stop_gradient(x) * mx.stop_gradient(x), (False, False)),
    ],
)
def test_an_edit_makes_another_array_and_a_copy_does_not(change, same):
    assert held_by(change) == same


def test_copies_of_one_array_are_the_same():
    x = mx.arange(4.0)
    held = identity.snapshot(mx.stop_gradient(x))
    assert identity.is_copy(mx.stop_gradient(mx.stop_gradient(x)), held)
    assert not identity.is_copy(mx.stop_gradient(x + 0), held)


def test_a_place_for_the_contents_was_found():
    assert identity.OFFSET is not None


def test_a_long_graph_is_asked_once():
    x = y = mx.zeros(3)
    for _ in range(100):
        y = y + 1
    assert identity.is_copy(y, identity.snapshot(x)) is None
    once = LastValue()
    values = once.of(x, mx.abs, traced=True)
    assert once.of(y, mx.abs, traced=True) is not values
    assert not once._search


def test_values_go_with_the_array():
    once, x = LastValue(), mx.arange(4.0)
    values = weakref.ref(once.of(x, mx.abs))
    held = weakref.ref(once._kept.stamp.contents)
    assert values() is not None
    del x
    gc.collect()
    assert values() is None
    assert held() is None


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_values_of_its_own(twin):
    model, x = prepared(), inputs()
    model(x)
    other = twin(model)
    assert other.layers[0].cached_values._kept is None
    other.layers[0].weight[0:96] = 0.5 * other.layers[0].weight
    assert equal(other(x), expected(other, x))
    assert not equal(other(x), model(x))
    assert equal(model(x), expected(model, x))


# How often weights are rounded

WEIGHTS = [(96, 64), (64, 96)]


def test_eight_parts_of_a_batch_cost_one_rounding(roundings):
    model, x = prepared(), inputs()
    gradient, optimizer = stepping(model), optim.SGD(0.1)
    for _ in range(3):
        roundings.clear()
        total = None
        for i in range(8):
            value, slopes = gradient(x * (i + 1))
            mx.eval(value, slopes)
            total = slopes if total is None else tree_map(mx.add, total, slopes)
        optimizer.update(model, total)
        mx.eval(model.parameters())
        assert roundings == WEIGHTS


def test_eight_parts_within_a_compiled_step_cost_one_rounding(roundings):
    model, x = prepared(), inputs()
    gradient, optimizer = stepping(model), optim.SGD(0.1)

    def step(x):
        total = None
        for i in range(8):
            slopes = gradient(x * (i + 1))[1]
            total = slopes if total is None else tree_map(mx.add, total, slopes)
        optimizer.update(model, total)

    optimizer.init(model.trainable_parameters())
    compiled = mx.compile(step, inputs=[model.state, optimizer.state], outputs=[model.state, optimizer.state])
    for _ in range(3):
        compiled(x)
        mx.eval(model.state)
    assert roundings == WEIGHTS  # traced once


def test_a_frozen_layer_is_rounded_once_for_all_steps(roundings):
    model, x = prepared(), inputs()
    model.layers[0].freeze()
    gradient, optimizer = stepping(model), optim.SGD(0.1)
    for _ in range(3):
        optimizer.update(model, gradient(x)[1])
        mx.eval(model.parameters())
    assert roundings.count((96, 64)) == 1
    assert roundings.count((64, 96)) == 3


def test_a_layer_that_is_used_twice_rounds_once(roundings):
    embedding = nn.Embedding(96, 64)
    embedding = qkit.prepare(embedding, Recipe("test", (Rule(("*",), kind="embedding", weight=INT4),)))
    gradient = nn.value_and_grad(embedding, lambda t: embedding.as_linear(embedding(t)).square().mean())
    slopes = gradient(mx.arange(7))[1]["weight"]
    assert roundings == [(96, 64)]
    want = mx.grad(lambda w: ((w_hat := BE.fake_quantize(w, INT4))[mx.arange(7)] @ w_hat.T).square().mean())
    assert equal(slopes, want(embedding["weight"]))


class Heads(nn.Module):
    """Three layers that read the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)

    def __call__(self, x):
        return self.q(x) + self.k(x) * self.v(x)


@pytest.mark.parametrize(
    "run", [lambda f, _: f, lambda f, m: mx.compile(f, inputs=[m.state])], ids=["eager", "compiled"]
)
def test_layers_that_read_the_same_round_it_once(roundings, run):
    model = qkit.prepare(Heads(), Recipe("test", (Rule(("*",), weight=INT4, activation=INT8),)))
    x = inputs()
    y = run(lambda x: model(x), model)(x)
    assert roundings.count((5, 64)) == 1
    at = BE.fake_quantize(x, INT8)
    q, k, v = (mx.addmm(one.bias, at, BE.fake_quantize(one.weight, INT4).T) for one in (model.q, model.k, model.v))
    # MLX compiles the sum and the product into one kernel
    assert np.abs(BE.to_numpy(y - (q + k * v))).max() <= 1e-6 * np.abs(BE.to_numpy(y)).max()


@pytest.mark.parametrize("run", [lambda f: f, mx.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_what_layers_share_has_the_gradients_of_what_they_do_not(ste, run):
    rule = Rule(("*",), weight=INT4, activation=Grid("int8", "row", "minmax"), ste=ste)
    model = qkit.prepare(Heads(), Recipe("test", (rule,)))

    def apart(x):
        return sum((layer(x * 1) ** 2).sum() for layer in (model.q, model.k, model.v))

    def shared(x):
        x = x * 1
        return sum((layer(x) ** 2).sum() for layer in (model.q, model.k, model.v))

    x = inputs()
    want = mx.grad(apart)(x)
    assert np.abs(BE.to_numpy(mx.grad(run(shared))(x) - want)).max() <= 1e-6 * np.abs(BE.to_numpy(want)).max()
    assert equal(shared(x), apart(x))


def test_an_input_of_nothing_is_not_kept():
    model = qkit.prepare(Heads(), Recipe("test", (Rule(("*",), weight=INT4, activation=INT8),)))
    x = mx.zeros((0, 64))
    gone = weakref.ref(x)
    mx.eval(model(x))
    del x
    gc.collect()
    assert gone() is None


def test_an_input_that_is_edited_between_two_layers_is_rounded_anew():
    class Edits(Heads):
        def __call__(self, x):
            before = self.q(x)
            x[0] = 3
            return before, self.q(x)

    model = qkit.prepare(Edits(), Recipe("test", (Rule(("*",), weight=INT4, activation=INT8),)))
    before, after = model(inputs())
    x = inputs()
    assert equal(before, model.q(x))
    x[0] = 3
    assert equal(after, model.q(x))
    assert not equal(before, after)


def test_inputs_on_other_grids_are_not_mixed_up():
    rules = (Rule(("q",), weight=INT4, activation=INT8), Rule(("*",), weight=INT4, activation=Grid("e4m3", "row")))
    model = qkit.prepare(Heads(), Recipe("test", rules))
    x = inputs()
    model.q(x)
    want = mx.addmm(model.k.bias, BE.fake_quantize(x, Grid("e4m3", "row")), BE.fake_quantize(model.k.weight, INT4).T)
    assert equal(model.k(x), want)


# Never what a weight was before


def replaced(model):
    model.layers[0].weight = model.layers[0].weight * -2


def edited(model):
    model.layers[0].weight[0:50] = model.layers[0].weight[0:50] * -2


def edited_by_name(model):
    weight = model.parameters()["layers"][0]["weight"]
    weight *= -2


def updated(model):
    model.update({"layers": [{"weight": model.layers[0].weight * -2}]})


def loaded(model):
    model.load_weights([("layers.0.weight", model.layers[0].weight * -2)], strict=False)


def averaged(model):
    other = prepared()
    other.layers[0].weight = other.layers[0].weight * -4
    model.update(tree_map(lambda a, b: 0.5 * a + 0.5 * b, model.parameters(), other.parameters()))


def applied(model):
    model.apply(lambda array: array * -2)


def cast(model):
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)


def stepped(model):
    optim.SGD(10.0).update(model, stepping(model)(inputs())[1])


def stepped_by_ours(model):
    BE.adamw(model, AdamWOptions(learning_rate=0.1)).update(model, stepping(model)(inputs())[1])


CHANGES = [replaced, edited, edited_by_name, updated, loaded, averaged, applied, cast, stepped, stepped_by_ours]
WAYS = {
    "eager": lambda model: lambda x: model(x),
    "gradient": lambda model: lambda x: nn.value_and_grad(model, lambda x: loss(model, x))(x)[0],
    "compiled": lambda model: mx.compile(lambda x: model(x), inputs=[model.state]),
    "compiled gradient": lambda model: mx.compile(
        lambda x: nn.value_and_grad(model, lambda x: loss(model, x))(x)[0], inputs=[model.state], outputs=[model.state]
    ),
}


@pytest.mark.parametrize("evaluate", [True, False], ids=["evaluated", "lazy"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_rounded_anew(change, way, evaluate):
    model, x = prepared(), inputs()
    run = WAYS[way](model)
    before = run(x)
    run(x)
    if evaluate:
        mx.eval(before, model.state)
    change(model)
    if evaluate:
        mx.eval(model.state)
    after = run(x)
    want = expected(model, x)
    want = loss(lambda x: want, x) if "gradient" in way else want
    # compiled sums take another order
    assert np.allclose(BE.to_numpy(after), BE.to_numpy(want), rtol=1e-6, atol=1e-6)
    if way == "eager":
        assert equal(after, want)
    assert not np.allclose(BE.to_numpy(after), BE.to_numpy(before), rtol=1e-3)


@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_gradients_of_the_second_part_are_those_of_the_first(ste):
    model, x = prepared(ste=ste), inputs()
    gradient = stepping(model)
    first, again = gradient(x), gradient(x)
    slow = prepared(ste=ste)
    third = stepping(slow)(x)
    for layer in (0, 2):
        slopes = [found[1]["layers"][layer]["weight"] for found in (first, again, third)]
        assert equal(slopes[0], slopes[1])
        assert equal(slopes[0], slopes[2])
        assert np.count_nonzero(BE.to_numpy(slopes[0]))


def test_a_masked_gradient_stops_where_the_weight_was_clipped():
    x, ends = inputs(), {}
    for ste in ("identity", "masked"):
        model = prepared(ste=ste)
        stepping(model)(x)
        ends[ste] = stepping(model)(x)[1]["layers"][2]["weight"]
    inside = BE.unclipped(floats().layers[2].weight, INT4)
    assert not inside.all()
    assert equal(ends["masked"], mx.where(inside, ends["identity"], 0))


def test_gradients_of_other_weights_than_the_models_own():
    """As a meta-learner takes them: the model is given tracers of weights that it never held."""
    model, x = prepared(), inputs()
    stepping(model)(x)

    def at(parameters):
        model.update(parameters)
        return loss(model, x)

    other = tree_map(lambda w: w * 3, model.trainable_parameters())
    value, _ = mx.value_and_grad(at)(other)
    model.update(other)
    assert equal(value, loss(lambda x: expected(model, x), x))


def test_checkpointed_layers_train_the_same():
    model, x = prepared(), inputs()
    first, relu, last = model.layers
    want = stepping(model)(x)
    checkpointed = nn.utils.checkpoint(first)
    got = nn.value_and_grad(model, lambda x: last(relu(checkpointed(x))).square().mean())(x)
    assert equal(got[0], want[0])
    assert equal(got[1]["layers"][0]["weight"], want[1]["layers"][0]["weight"])


@pytest.mark.parametrize("way", ["output", "gradient"])
def test_values_of_a_function_that_captured_the_weights_are_right_outside_of_it(way):
    """Compiled without the model's state, whose weights are then constants of MLX's: what was made of them is constant too."""
    model, x = prepared(INT8), inputs()
    run = (lambda x: model(x)) if way == "output" else (lambda x: stepping(model)(x)[0])
    compiled = mx.compile(run)
    first = compiled(x)
    assert equal(run(x), run(mx.array(BE.to_numpy(x))))
    assert np.allclose(BE.to_numpy(first), BE.to_numpy(run(x)), rtol=1e-6, atol=1e-6)  # sums in another order
    edited(model)
    assert not np.allclose(BE.to_numpy(first), BE.to_numpy(run(x)), rtol=1e-2)
    slow = prepared(INT8)
    edited(slow)
    want = slow(x) if way == "output" else loss(slow, x)
    assert equal(run(x), want)


def test_two_models_do_not_meet():
    one, two, x = prepared(), prepared(), inputs()
    two.layers[0].weight = two.layers[0].weight * 2
    for _ in range(2):
        assert equal(one(x), expected(one, x))
        assert equal(two(x), expected(two, x))


def test_a_write_that_mlx_does_not_show_is_seen_after_a_change_of_mode():
    """Through NumPy's view of the memory: no array of MLX's is another after it."""
    model, x = prepared(), inputs()
    model(x)
    np.array(model.layers[0].weight, copy=False)[:] *= -2
    model.train()
    assert equal(model(x), expected(model, x))


# The same losses


class Slow(nn.Module):
    """A linear layer that rounds its weight, and its input, at every call."""

    def __init__(self, layer, activation):
        super().__init__()
        self.weight, self.bias, self.activation = layer.weight, layer.bias, activation

    def __call__(self, x):
        x = x if self.activation is None else BE.fake_quantize(x, self.activation)
        return mx.addmm(self.bias, x, BE.fake_quantize(self.weight, INT4).T)


def slow(activation):
    first, relu, last = floats().layers
    return nn.Sequential(Slow(first, activation), relu, Slow(last, activation))


def losses(model, optimizer, *, parts, compiled):
    gradient = stepping(model)
    data = [mx.random.normal((parts, 8, 64), key=mx.random.key(i)) for i in range(50)]

    def step(batch):
        total, found = None, []
        for part in batch:
            value, slopes = gradient(part)
            found.append(value)
            total = slopes if total is None else tree_map(mx.add, total, slopes)
        optimizer.update(model, total)
        return mx.stack(found)

    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    made = []
    for batch in data:
        made.append(step(batch))
        mx.eval(made[-1], state)
    return np.array(mx.stack(made))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("activation", [None, INT8], ids=["weights", "both"])
@pytest.mark.parametrize("ours", [True, False], ids=["qkit.adamw", "AdamW"])
def test_fifty_losses_are_those_of_rounding_at_every_call(compiled, parts, activation, ours):
    ends = []
    for model in (prepared(activation), slow(activation)):
        plain = optim.AdamW(1e-2, bias_correction=True)
        optimizer = BE.adamw(model, AdamWOptions(learning_rate=1e-2)) if ours else plain
        ends.append(losses(model, optimizer, parts=parts, compiled=compiled))
    assert np.array_equal(*ends)
    assert ends[0][-1].mean() < 0.5 * ends[0][0].mean()
