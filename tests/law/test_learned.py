"""Learned ranges: the law in NumPy, both engines against it, and what they are worth at two bits."""

import numpy as np
import pytest
from models import small
from runs import TOKENS
from tables import MODULES as ENGINES

import qkit
from qkit import Grid, Recipe, Rule, reference
from qkit.element import MIN_SCALE
from qkit.engines.trainer import TrainerOptions
from qkit.errors import RangeError, RecipeError, StageError
from qkit.qtensor import dtype_of
from qkit.reference import learned, rounding, scale_rules
from qkit.rules import rule_from_table, rule_table

GRIDS = [
    *(Grid(f"int{bits}", 32, rule) for bits in (2, 4, 8) for rule in ("signed", "absmax", "midmax", "minmax")),
    Grid("int3", "row"),
    Grid("int4", "tensor"),
    *(Grid(element, 32, rule) for element in ("e2m1", "e4m3", "e5m2") for rule in ("rceil", "even", "floor")),
]
RNG = np.random.default_rng


def moved(w, grid, seed=2):
    """Ranges that have been trained a while: near those of the rule, a few of them odd."""
    rng = RNG(seed)
    p = learned.initial(w, grid)
    for name, x in p.items():
        step = np.float32(3.0) if name != "weight_scale" else np.abs(x).mean()
        p[name] = (x + step * 0.5 * rng.standard_normal(x.shape)).astype(np.float32)
        p[name].flat[0] = 0 if name == "weight_scale" else 1000
        p[name].flat[-1] *= -1
    return p


def weight(grid, dtype="float32"):
    return rounding.to_dtype(0.3 * RNG(1).standard_normal((8, 64)).astype(np.float32), dtype)


def recipe(grid, kind="linear", **more):
    return Recipe("test", (Rule(("*",), kind=kind, weight=grid, scales="learned", **more),))


# The law


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_begin_as_those_of_the_rule(grid):
    w = weight(grid)
    p = learned.initial(w, grid)
    assert tuple(p) == learned.names(grid)
    assert all(x.shape == grid.scale_shape(w.shape) and x.dtype == np.float32 for x in p.values())
    assert (learned.fake_quantize(w, grid, p) == reference.fake_quantize(w, grid)).all()
    ours, theirs = learned.quantize(w, grid, p).parts(), reference.quantize(w, grid).parts()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_what_the_codes_mean(grid, dtype):
    w = weight(grid, dtype)
    p = moved(w, grid)
    q = learned.quantize(w, grid, p)
    assert (learned.fake_quantize(w, grid, p) == reference.dequantize(q)).all()
    s = reference.scale_values(q)
    assert (scale_rules.round_to_bfloat16(s) == s).all()
    assert (np.abs(s) >= MIN_SCALE).all()
    assert grid.scale == "signed" or (s > 0).all()


def test_a_range_that_is_not_finite_spoils_its_group_only():
    for grid in (Grid("int4", 32), Grid("int4", 32, "minmax"), Grid("e2m1", 32)):
        w = weight(grid)
        for name in learned.names(grid):
            for bad in (np.nan, np.inf, np.array(0x7FFFFFFF, np.int32).view(np.float32)):
                p = learned.initial(w, grid)
                p[name][1, 0] = bad
                spoilt = np.isnan(learned.fake_quantize(w, grid, p))
                assert spoilt[1, :32].all()
                assert spoilt.sum() == 32


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int3", 32, "absmax"), Grid("int4", 32, "minmax")], ids=str)
def test_the_gradient_of_a_scale_is_that_of_lsq(grid):
    """Equation 3 of the paper, element by element, written as there."""
    w, g = weight(grid), RNG(3).standard_normal((8, 64)).astype(np.float32)
    p = learned.initial(w, grid)
    p["weight_scale"] *= 0.7  # clips some
    s, z = learned.steps(w, grid, p)
    lowest, highest = (grid.element.lowest, grid.element.highest) if z is None else (0, grid.element.levels)
    x, each, zero = w.reshape(8, 2, 32), s[..., None], 0 if z is None else z[..., None]
    q = np.rint(x / each) + zero
    low, high = q < lowest, q > highest
    slope = np.where(low, lowest - zero, np.where(high, highest - zero, q - zero - x / each))
    want = (g.reshape(x.shape) * slope).sum(-1) / np.sqrt(32 * highest)
    found = learned.gradients(w, grid, p, g)
    assert 0 < (low | high).mean() < 0.5
    assert np.allclose(found["weight_scale"], want, rtol=1e-4, atol=1e-5)  # sums in float32, in another form
    assert (found["weight"] == np.where((low | high).reshape(w.shape), 0, g)).all()
    if z is not None:
        want = (g.reshape(x.shape) * np.where(low | high, -each, 0)).sum(-1) / np.sqrt(32 * highest)
        assert np.allclose(found["weight_zero"], want, rtol=1e-4, atol=1e-5)  # as above


def test_the_gradient_of_an_offset_is_that_of_the_scale_times_ln_2():
    grid = Grid("e2m1", 32)
    w, g = weight(grid), RNG(3).standard_normal((8, 64)).astype(np.float32)
    p = {"weight_offset": np.full((8, 2), -1.2, np.float32)}  # one down: some are clipped
    q = reference.dequantize(learned.quantize(w, grid, p))
    s = np.repeat(learned.steps(w, grid, p)[0], 32, axis=1)
    slope = np.where(np.abs(w) > 6 * s, np.sign(w) * 6, (q - w) / s)
    want = (g * slope * s * np.log(2)).reshape(8, 2, 32).sum(-1) / np.sqrt(32 * 6)
    assert (np.abs(w) > 6 * s).any()
    assert np.allclose(learned.gradients(w, grid, p, g)["weight_offset"], want, rtol=1e-4, atol=1e-6)  # float32 sums


# Both engines


def on_engine(engine, w, grid, p, g, *, compiled=False):
    """Values and gradients, as NumPy arrays."""
    be = pytest.importorskip({"torchao": "torch", "mlx": "mlx.core"}[engine]) and qkit.backend(engine)
    arrays = [be.from_numpy(x) for x in (w, *p.values())]
    if engine == "torchao":
        from qkit_torchao.layers.learned import fake_quantize

        for x in arrays:
            x.requires_grad_()
        values = (be.compile if compiled else lambda f: f)(lambda *xs: fake_quantize(xs[0], grid, *xs[1:]))(*arrays)
        values.backward(be.from_numpy(g))
        made = [x.grad for x in arrays]
    else:
        import mlx.core as mx
        from qkit_mlx.arithmetic.learned import fake_quantize

        def both(cotangent, *xs):
            out, made = mx.vjp(lambda w, *p: fake_quantize(w, grid, *p), list(xs), [cotangent])
            return [*out, *made]

        values, *made = (mx.compile if compiled else lambda f: f)(both)(be.from_numpy(g), *arrays)
    return be.to_numpy(values), dict(zip(("weight", *p), map(be.to_numpy, made), strict=True))


def check_engine(engine, grid, dtype, *, compiled=False):
    w = weight(grid, dtype)
    p, g = moved(w, grid), rounding.to_dtype(RNG(3).standard_normal(w.shape).astype(np.float32), dtype)
    values, made = on_engine(engine, w, grid, p, g, compiled=compiled)
    assert dtype_of(values) == dtype
    assert (values == learned.fake_quantize(w, grid, p)).all()
    want = learned.gradients(w, grid, p, g)
    assert (made["weight"] == want["weight"]).all()
    size = learned.gradients(w, grid, p, np.abs(g))
    for name in p:  # engines add up a group in another order: relative to the largest sum
        assert np.abs(made[name] - want[name]).max() <= 1e-6 * max(np.abs(size[name]).max(), np.abs(want[name]).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients_are_those_of_the_law(engine, grid):
    check_engine(engine, grid, "float32")
    check_engine(engine, grid, "bfloat16")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int2", 32, "minmax"), Grid("e4m3", 32)], ids=str)
def test_compiled_code_obeys_the_law(engine, grid):
    check_engine(engine, grid, "float32", compiled=True)


ALONE = [
    Grid("int4", 32),
    Grid("int2", 32, "minmax"),
    Grid("int8", "row", "absmax"),
    Grid("int3", 16, "midmax"),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", ALONE, ids=str)
def test_codes_stay_where_scales_train_alone(engine, grid, compiled):
    be = pytest.importorskip({"torchao": "torch", "mlx": "mlx.core"}[engine]) and qkit.backend(engine)
    for dtype in ("float32", "bfloat16"):
        w, first = weight(grid, dtype), moved(weight(grid), grid)
        p = {**moved(w, grid, seed=5), **{learned.FIRST + name: x for name, x in first.items()}}
        g = rounding.to_dtype(RNG(3).standard_normal(w.shape).astype(np.float32), dtype)
        q, size = learned.alone(w, grid, p), learned.gradient_alone(w, grid, p, np.abs(g))["weight_scale"]
        assert (q.codes == learned.quantize(w, grid, first).codes).all()
        assert (q.codes != learned.quantize(w, grid, {name: p[name] for name in first}).codes).any()
        want = learned.gradient_alone(w, grid, p, g)["weight_scale"]
        arrays = [be.from_numpy(x) for x in (w, *p.values())]
        if engine == "torchao":
            from qkit_torchao.arithmetic.learned import values_alone

            arrays[1].requires_grad_()
            run = (be.compile if compiled else lambda f: f)(lambda *xs: values_alone(xs[0], grid, *xs[1:]))
            values = run(*arrays)
            values.backward(be.from_numpy(g))
            made = arrays[1].grad
        else:
            import mlx.core as mx
            from qkit_mlx.arithmetic.learned import values_alone

            def both(cotangent, s, *xs, mx=mx, values_alone=values_alone):
                out, made = mx.vjp(lambda s: values_alone(xs[0], grid, s, *xs[1:]), [s], [cotangent])
                return out[0], made[0]

            run = (mx.compile if compiled else lambda f: f)(both)
            values, made = run(be.from_numpy(g), arrays[1], arrays[0], *arrays[2:])
        assert dtype_of(be.to_numpy(values)) == dtype
        assert (be.to_numpy(values) == reference.dequantize(q)).all()
        assert np.abs(be.to_numpy(made) - want).max() <= 1e-6 * np.abs(size).max()  # sums in another order


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int4", 32, "minmax"), Grid("e2m1", 32)], ids=str)
def test_a_range_that_is_not_finite_spoils_its_group_on_engines_too(engine, grid):
    w = weight(grid)
    for name in learned.names(grid):
        p = learned.initial(w, grid)
        p[name][1, 0] = np.array(0x7FFFFFFF, np.int32).view(
            np.float32
        )  # CUDA's NaN, which rounding in integers would lose
        p[name][2, 1] = np.inf
        values, _ = on_engine(engine, w, grid, p, np.ones_like(w))
        assert np.isnan(values[1, :32]).all()
        assert np.isnan(values[2, 32:]).all()
        assert np.isnan(values).sum() == 64


class Torch:
    """Three layers, a loss and AdamW, in torch."""

    def __init__(self, dtype="float32"):
        import torch

        self.t, self.be = torch, qkit.backend("torchao")
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        self.model.to(self.t.bfloat16 if dtype == "bfloat16" else self.t.float32)

    def parameters(self):
        return dict(self.model.named_parameters())

    def train(self, x, y, steps, *, lr=2e-3, **options):
        x, y = self.be.from_numpy(x), self.be.from_numpy(y)
        optimizer = qkit.adamw(self.model, lr=lr, **{"weight_decay": 0.0, **options})
        for _ in range(steps):
            loss = (self.model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (self.model(x) - y).square().mean().item()


class Mlx:
    """The same in MLX."""

    def __init__(self, dtype="float32"):
        import mlx.core as mx
        import mlx.nn as nn

        self.mx, self.nn, self.be = mx, nn, qkit.backend("mlx")
        mx.random.seed(0)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        if dtype == "bfloat16":
            self.model.set_dtype(mx.bfloat16)
        mx.eval(self.model.state)

    def parameters(self):
        from mlx.utils import tree_flatten

        return dict(tree_flatten(self.model.trainable_parameters()))

    def train(self, x, y, steps, *, lr=2e-3, **options):
        x, y = self.mx.array(x), self.mx.array(y)
        optimizer = qkit.adamw(self.model, lr=lr, **{"weight_decay": 0.0, **options})

        def loss():
            return (self.model(x) - y).square().mean()

        for _ in range(steps):
            optimizer.update(self.model, self.nn.value_and_grad(self.model, loss)()[1])
            self.mx.eval(self.model.state, optimizer.state)
        return float(loss())


@pytest.fixture(params=[Torch, Mlx], ids=["torchao", "mlx"])
def make(request):
    pytest.importorskip("torchao" if request.param is Torch else "mlx.core")
    return request.param


def data(seed=5):
    rng = RNG(seed)
    x = rng.standard_normal((128, 64)).astype(np.float32)
    return x, np.tanh(x @ (0.2 * rng.standard_normal((64, 32)).astype(np.float32)))


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int3", 32, "minmax"), Grid("e2m1", 32)], ids=str)
def test_a_trained_layer_converts_to_what_it_computed(make, grid, tmp_path):
    one = make()
    x, y = data()
    one.model = qkit.prepare(one.model, recipe(grid))
    rule = one.be.to_numpy(one.be.fake_quantize(one.be.weight(layer(one, 0)), grid))
    assert set(learned.names(grid)) <= {name.rpartition(".")[2] for name in one.parameters()}
    one.train(x, y, 20, lr=0.05)
    assert "learned" in str(qkit.coverage(one.model))
    before = {name: one.be.to_numpy(a) for name, a in one.be.tensors(one.model).items()}
    path = next(name for name in before if name.endswith(learned.names(grid)[0])).rpartition(".")[0]
    p = {name: before[f"{path}.{name}"] for name in learned.names(grid)}
    trained = before[f"{path}.weight"]
    output = one.be.run_layer(one.model, x)
    training = one.be.to_numpy(one.model(one.be.from_numpy(x)))
    one.model = qkit.convert(one.model)
    q = one.be.unpack(layer(one, 0)).map(one.be.to_numpy)
    law = learned.quantize(trained, grid, p)
    assert all((a == b).all() for a, b in zip(q.parts().values(), law.parts().values(), strict=True))
    assert (one.be.run_layer(one.model, x) == output).all()
    assert np.allclose(training, output, rtol=0, atol=1e-5)  # MLX's deployed product adds up in another order
    assert (reference.dequantize(q) != rule).any()
    assert not any(map(learned.is_learned, one.be.tensors(one.model)))
    qkit.save(one.model, tmp_path / "out")
    other = qkit.load(tmp_path / "out", into=make().model)
    assert (one.be.run_layer(other, x) == output).all()


def layer(one, number):
    return [found for found in one.be.layers(one.model) if found.kind == "linear"][number].module


def test_the_first_step_is_that_of_the_rule(make):
    x, _ = data()
    grid = Grid("int2", 32)
    ours, theirs = make(), make()
    ours.model, theirs.model = qkit.prepare(ours.model, recipe(grid)), qkit.prepare(theirs.model, "int2-g32")
    a, b = (one.be.to_numpy(one.model(one.be.from_numpy(x))) for one in (ours, theirs))
    assert (a == b).all()


def test_learning_scales_helps_at_two_bits(make):
    x, y = data()
    losses = {}
    for scales in ("rule", "learned"):
        one = make()
        rule = Rule(("*",), weight=Grid("int2", 32), scales=scales)
        one.model = qkit.prepare(one.model, Recipe("test", (rule,)))
        losses[scales] = one.train(x, y, 300)
    print(make.__name__, losses)
    assert losses["learned"] < 0.9 * losses["rule"]


OFFSETS = [(Grid("int2", 32, "minmax"), "weight_zero"), (Grid("e2m1", 32), "weight_offset")]


@pytest.mark.parametrize(("grid", "name"), OFFSETS, ids=["zero points", "exponents"])
def test_offsets_have_a_rate_of_their_own_and_change_codes(make, grid, name):
    """Under a rate for weights they stay within a hundredth, and no code is another for them; under their own some are."""
    x, y = data()
    codes = {}
    for rate in (1e-5, None):
        one = make()
        one.model = qkit.prepare(one.model, recipe(grid))
        before = ranges(one, name)
        one.train(x, y, 100, lr=1e-5, **({} if rate is None else {"offset_lr": rate}))
        after, w = ranges(one, name), one.be.to_numpy(layer(one, 0).weight)
        p = {key: ranges(one, key) for key in learned.names(grid)}
        codes[rate] = [learned.quantize(w, grid, {**p, name: x}).codes for x in (after, before)]
        furthest = np.abs(after - before).max()
        assert furthest < 0.01 if rate else furthest > 0.5
    assert (codes[1e-5][0] == codes[1e-5][1]).all()
    assert (codes[None][0] != codes[None][1]).any()


def ranges(one, name):
    """The parameter called `name` of the first layer, copied."""
    return np.array(next(one.be.to_numpy(a) for key, a in one.be.tensors(one.model).items() if key.endswith(name)))


def test_a_rate_of_offsets_moves_nothing_but_offsets(make):
    """The first step of AdamW is a rate long, whatever the gradient."""
    x, y = data()
    grown = []
    for rate in (0.0, 0.25):
        one = make()
        one.model = qkit.prepare(one.model, recipe(Grid("int3", 32, "minmax")))
        before = {name: np.array(one.be.to_numpy(a)) for name, a in one.parameters().items()}
        one.train(x, y, 1, lr=1e-3, offset_lr=rate)
        grown.append({name: one.be.to_numpy(a) - before[name] for name, a in one.parameters().items()})
    for name, still in grown[0].items():
        if learned.is_offset(name):
            assert not still.any()
            moved = np.abs(grown[1][name])
            assert moved.any()
            assert np.allclose(moved[moved > 0], 0.25, rtol=1e-2)  # eps beside the gradient
        else:
            assert still.any()
            assert (still == grown[1][name]).all()


def test_mlx_takes_schedules_for_both_rates():
    mx = pytest.importorskip("mlx.core")
    one, (x, y) = Mlx(), data()
    one.model = qkit.prepare(one.model, recipe(Grid("e2m1", 32)))
    one.train(x, y, 3, lr=lambda step: mx.array(1e-3), offset_lr=lambda step: 0.125 * (step == 1).astype(mx.float32))
    moved = np.abs(ranges(one, "weight_offset"))
    assert 0 < moved.max() < 0.25  # one step of the three


def test_weight_decay_does_not_pull_at_ranges(make):
    x, y = data()
    grown = []
    for decay in (0.0, 0.5):
        one = make()
        one.model = qkit.prepare(one.model, recipe(Grid("int4", 32, "minmax")))
        one.train(x, y, 1, lr=0.1, weight_decay=decay)
        grown.append({name: one.be.to_numpy(a) for name, a in one.parameters().items()})
    for name in grown[0]:
        assert (grown[0][name] == grown[1][name]).all() == name.endswith((".weight_scale", ".weight_zero"))


@pytest.mark.parametrize("name", ENGINES)
def test_a_trainer_does_not_pull_at_ranges_either(name):
    start, decayed, free = (
        trained(name, steps=steps, weight_decay=decay) for steps, decay in ((0, 0), (1, 0.5), (1, 0))
    )
    for key in start:
        if key.startswith("weights.") and start[key].ndim > 1 and "proj" in key:
            assert (decayed[key] == free[key]).all() == key.endswith(".weight_scale")
            assert (start[key] != free[key]).any()


def trained(name, *, steps, weight_decay=0.0, state=None, rule="int3-g32"):
    """The state of a trainer of the small Llama after `steps` more."""
    pytest.importorskip({"torchao": "torch", "mlx": "mlx.core"}[name])
    engine, grid = qkit.backend(name), qkit.recipe(rule).rules[-1].weight
    model = qkit.prepare(small(name, num_hidden_layers=1), recipe(grid))
    trainer = engine.trainer(model, TrainerOptions(weight_decay=weight_decay, seed=0))
    if state is not None:
        trainer.restore(state)
    for _ in range(steps):
        trainer.step([TOKENS[:2]], learning_rate=1e-2)
    return {key: np.array(x) for key, x in trainer.state().items()}


@pytest.mark.parametrize("name", ENGINES)
def test_a_trainer_that_is_resumed_goes_on_as_if_it_had_not_stopped(name):
    whole = trained(name, steps=4)
    parts = trained(name, steps=2, state=trained(name, steps=2))
    assert any(learned.is_learned(key) for key in whole)
    assert whole.keys() == parts.keys()
    assert all((whole[key] == parts[key]).all() for key in whole)


def test_a_run_goes_on_on_the_other_engine():
    """The share of equal codes is what the two engines' products leave, which add up in another order."""
    half = trained("torchao", steps=2)
    here, there = (trained(name, steps=2, state=half) for name in ENGINES)
    grid = Grid("int3", 32)
    scales = [key for key in here if key.startswith("weights.") and key.endswith("weight_scale")]
    weights = {key: key.replace("weight_scale", "weight") for key in scales}
    codes = [
        [learned.quantize(x[w], grid, {"weight_scale": x[s]}).codes for s, w in weights.items()] for x in (here, there)
    ]
    equal = np.concatenate([(a == b).ravel() for a, b in zip(*codes, strict=True)])
    assert len(scales) == 8
    assert equal.mean() >= 0.999


def test_ranges_stay_in_float32_when_the_model_is_cast(make):
    one = make()
    one.model = qkit.prepare(one.model, recipe(Grid("int4", 32)))
    p = layer(one, 0)
    before = one.be.to_numpy(p.weight_scale)
    if make is Torch:
        one.model.to(one.t.bfloat16)
    else:
        one.model.set_dtype(one.mx.bfloat16)
    assert dtype_of(p.weight) == "bfloat16"
    assert dtype_of(p.weight_scale) == "float32"
    assert (one.be.to_numpy(p.weight_scale) == before).all()


def test_an_embedding_learns_too(make):
    tokens = np.arange(12).reshape(3, 4)
    be = make().be
    table = be.make_layer("embedding", RNG(0).standard_normal((16, 64)).astype(np.float32))
    table = qkit.prepare(table, recipe(Grid("int3", 32), kind="embedding"))
    rows = np.array(be.to_numpy(table.weight))
    p = {"weight_scale": be.to_numpy(table.weight_scale) * np.float32(1.3)}
    be.fill(table, {"weight": rows, **p})
    want = learned.fake_quantize(rows, Grid("int3", 32), p)[tokens]
    assert (be.to_numpy(table(be.from_numpy(tokens))) == want).all()
    assert (be.run_layer(table, tokens) == want).all()
    assert (be.run_layer(qkit.convert(table), tokens) == want).all()


def test_a_layer_that_is_switched_off_is_the_float_layer(make):
    x, _ = data()
    one = make()
    want = one.be.run_layer(one.model, x)
    one.model = qkit.prepare(one.model, recipe(Grid("int2", 32)))
    with qkit.disabled(one.model):
        assert (one.be.run_layer(one.model, x) == want).all()
    assert (one.be.run_layer(one.model, x) != want).any()


def test_names_are_the_same_on_both_engines():
    pytest.importorskip("torchao")
    pytest.importorskip("mlx.core")
    for grid in (Grid("int4", 32, "minmax"), Grid("e2m1", 32)):
        found = []
        for one in (Torch(), Mlx()):
            one.model = qkit.prepare(one.model, recipe(grid))
            found.append({name.rpartition(".")[2] for name in one.be.tensors(one.model)})
        assert found[0] == found[1] == {"weight", "bias", *learned.names(grid)}


# Refusals


def test_what_cannot_learn_is_refused():
    with pytest.raises(RecipeError, match=r'scales = "learned" is not there for e2m1-g16-nvfp4'):
        recipe(Grid("e2m1", 16, "nvfp4"))
    with pytest.raises(RecipeError, match=r'scales = "learned" needs a weight grid'):
        Rule(("*",), scales="learned")
    with pytest.raises(RecipeError, match="scales is 'lsq': choose one of rule, learned"):
        Rule(("*",), weight=Grid("int4", 32), scales="lsq")


def test_a_rule_survives_files():
    rule = recipe(Grid("int4", 32)).rules[0]
    assert rule_table(rule)["scales"] == "learned"
    assert rule_from_table(rule_table(rule)) == rule


def test_a_range_that_is_not_finite_is_not_converted(make):
    one = make()
    one.model = qkit.prepare(one.model, recipe(Grid("int4", 32)))
    state = {name: np.array(one.be.to_numpy(a)) for name, a in one.be.tensors(one.model).items()}
    name = next(name for name in state if name.endswith("weight_scale"))
    state[name][3, 1] = np.nan
    one.be.fill(one.model, state)
    with pytest.raises(RangeError, match=f"{name} is not finite"):
        qkit.convert(one.model)


def test_an_adapter_is_refused(make):
    one = make()
    one.model = qkit.prepare(one.model, recipe(Grid("int4", 32)))
    with pytest.raises(StageError, match="cannot take an adapter: its scales are learned"):
        qkit.adapt(one.model, qkit.Adapter(rank=2))


def test_tied_layers_are_refused():
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    with pytest.raises(RecipeError, match="b: its weight is tied to that of a, and two layers cannot learn"):
        qkit.prepare(model, recipe(Grid("int4", 32)))
