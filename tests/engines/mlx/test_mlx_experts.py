"""Stacks of experts on MLX, and the halves of kv_b_proj: values, codes, gradients, and the kernels that multiply them."""

import copy

import numpy as np
import pytest
from alike import equal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
switch = pytest.importorskip("mlx_lm.models.switch_layers")
mla = pytest.importorskip("mlx_lm.models.mla")

import mlx.nn as nn  # noqa: E402
from qkit_mlx.kernels import choose  # noqa: E402
from qkit_mlx.layers.converted_experts import PackedSwitchLinear, PlainSwitchLinear  # noqa: E402

import qkit  # noqa: E402
from qkit import Grid, Recipe, Rule  # noqa: E402
from qkit.experts import quantize_experts  # noqa: E402
from qkit.reference import rounding as law  # noqa: E402

BE = qkit.backend("mlx")
EXPERTS, WIDTH, INNER = 6, 128, 96
#: Whether MLX has a kernel for the stack, by grid.
GRIDS = {
    Grid("int4", 32): True,
    Grid("int3", 32, "minmax"): True,
    Grid("int8", "row"): True,
    Grid("int8", "tensor"): True,
    Grid("e2m1", 32): True,
    Grid("e4m3", 32): True,
    Grid("e2m1", 16, "nvfp4"): True,
    Grid("e5m2", 32): False,
    Grid("int4", 16): False,
}


class Mixture(nn.Module):
    """A router and its experts, as in mlx-lm's models."""

    def __init__(self, *, bias=False):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.switch_mlp = switch.SwitchGLU(WIDTH, INNER, EXPERTS, bias=bias)

    def __call__(self, x):
        scores = mx.softmax(self.gate(x), axis=-1)
        chosen = mx.stop_gradient(mx.argpartition(-scores, 1, axis=-1)[..., :2])
        return (self.switch_mlp(x, chosen) * mx.take_along_axis(scores, chosen, -1)[..., None]).sum(-2)


def mixture(*, bias=False):
    mx.random.seed(0)
    model = Mixture(bias=bias)
    if bias:
        for part in (model.switch_mlp.gate_proj, model.switch_mlp.up_proj, model.switch_mlp.down_proj):
            part.bias = mx.random.normal(part.bias.shape)
    return model


def recipe(grid):
    return Recipe("test", (Rule(("*",), kind="experts", weight=grid),))


def tokens(count=9):
    return mx.random.normal((2, count, WIDTH), key=mx.random.key(1))


def weights(model):
    return {name: np.array(model.switch_mlp[name].weight) for name in ("gate_proj", "up_proj", "down_proj")}


def by_law(model, grid):
    return quantize_experts(weights(model), grid, qkit.backend("numpy"))


def with_values(model, grid):
    """The float model whose experts have the law's values."""
    made = copy.deepcopy(model)
    for name, codes in by_law(model, grid).items():
        made.switch_mlp[name].weight = mx.array(np.stack([law.dequantize(q) for q in codes]))
    return made


def loss(model, x):
    return (model(x) ** 2).sum()


@pytest.mark.parametrize(("bias", "count"), [(True, 9), (False, 40)], ids=["few tokens", "sorted tokens"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_prepared_experts_are_the_converted_ones_and_have_the_law_s_values(grid, bias, count):
    model, x = mixture(bias=bias), tokens(count)
    wanted = with_values(model, grid)(x)
    prepared = qkit.prepare(model, recipe(grid))
    trained = prepared(x)
    assert equal(BE.to_numpy(trained), BE.to_numpy(wanted))
    prepared.eval()
    evaluated = prepared(x)
    converted = qkit.convert(prepared)
    assert equal(BE.to_numpy(evaluated), BE.to_numpy(converted(x)))
    kind = PackedSwitchLinear if GRIDS[grid] else PlainSwitchLinear
    assert all(type(converted.switch_mlp[name]) is kind for name in weights(mixture()))
    bound = (
        0 if grid.element.kind == "integer" else 1e-6
    )  # kernels of small floats sum otherwise, in two layers in a row
    assert float(mx.abs(evaluated - wanted).max()) <= bound * float(mx.abs(wanted).max())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_codes_of_each_expert_are_the_law_s(grid):
    model = mixture()
    wanted = by_law(model, grid)
    found = BE.unpack_experts(qkit.convert(model, recipe(grid)).switch_mlp)
    for name, codes in wanted.items():
        for mine, theirs in zip(found[name], codes, strict=True):
            assert all(equal(BE.to_numpy(part), theirs.parts()[key]) for key, part in mine.parts().items())


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("e2m1", 16, "nvfp4"), Grid("int8", "tensor")], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_pass_straight_through_the_grid(grid, training):
    model, x = mixture(), tokens()
    plain = with_values(model, grid)
    prepared = qkit.prepare(model, recipe(grid)).train(training)
    _, found = nn.value_and_grad(prepared, loss)(prepared, x)
    _, wanted = nn.value_and_grad(plain, loss)(plain, x)
    for name in weights(model):
        mine, theirs = found["switch_mlp"][name]["weight"], wanted["switch_mlp"][name]["weight"]
        assert float(mx.abs(mine - theirs).max()) <= 1e-5 * float(mx.abs(theirs).max())  # evaluation sums otherwise


def test_the_values_of_experts_are_computed_once_for_each_state_of_the_weight(monkeypatch):
    prepared, x, made = qkit.prepare(mixture(), recipe(Grid("int4", 32))).train(), tokens(), []
    real = choose.fake_quantize_weight
    monkeypatch.setattr(choose, "fake_quantize_weight", lambda w, grid, **k: made.append(w.shape) or real(w, grid, **k))
    mx.eval(prepared(x), prepared(x))
    assert len(made) == 3
    prepared.switch_mlp.up_proj.weight = prepared.switch_mlp.up_proj.weight * 1.5
    mx.eval(prepared(x))
    assert len(made) == 4


def test_a_router_is_no_layer_and_its_experts_are_one():
    rows = {row.path: row for row in qkit.coverage(qkit.prepare(mixture(), recipe(Grid("int4", 32)))).rows}
    assert set(rows) == {"gate.weight", "experts"}
    assert rows["gate.weight"].state == "left alone: a router"
    assert rows["experts"].shape == (EXPERTS, 3 * INNER, WIDTH)


def test_experts_without_a_kernel_are_decoded_one_by_one_and_only_those_that_tokens_chose(monkeypatch):
    model = qkit.convert(mixture(), recipe(Grid("e5m2", 32)))
    layer, decoded = model.switch_mlp.up_proj, []
    real = PlainSwitchLinear.unpack
    monkeypatch.setattr(PlainSwitchLinear, "unpack", lambda self, expert: decoded.append(expert) or real(self, expert))
    x, chosen = mx.random.normal((3, 1, 1, WIDTH)), mx.array([[4, 1], [1, 4], [4, 4]])
    eager = layer(x, chosen)
    assert decoded == [1, 4]
    compiled = mx.compile(lambda x, chosen: layer(x, chosen))(x, chosen)
    assert equal(BE.to_numpy(compiled), BE.to_numpy(eager))


def test_a_schedule_switches_and_freezes_experts_and_gives_them_another_grid():
    model, x = mixture(), tokens()
    plain = model(x)
    prepared = qkit.prepare(model, recipe(Grid("int4", 32))).train()
    (layer,) = (layer for layer in BE.layers(prepared) if layer.kind == "experts")
    BE.switch_mode(layer.module, "off")
    assert equal(BE.to_numpy(prepared(x)), BE.to_numpy(plain))
    BE.switch_mode(layer.module, "on")
    quantized = prepared(x)
    BE.freeze_values(layer.module, on=True)
    prepared.switch_mlp.up_proj.weight = prepared.switch_mlp.up_proj.weight * 1.5
    assert equal(BE.to_numpy(prepared(x)), BE.to_numpy(quantized))
    BE.freeze_values(layer.module, on=False)
    BE.regrid(layer.module, Rule(("*",), kind="experts", weight=Grid("int8", 32)))
    assert equal(BE.to_numpy(prepared(x)), BE.to_numpy(with_values(prepared_weights(prepared), Grid("int8", 32))(x)))


def prepared_weights(prepared):
    """The float model with the masters of a prepared one."""
    made = mixture()
    for name in weights(made):
        made.switch_mlp[name].weight = prepared.switch_mlp[name].weight
    return made


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("e2m1", 16, "nvfp4")], ids=str)
@pytest.mark.parametrize("verb", [qkit.prepare, qkit.convert])
def test_mlx_lm_s_lora_of_experts_trains_inside_of_the_grid(verb, grid):
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    model, x = verb(mixture(), recipe(grid)).eval(), tokens()
    model.layers = [model.switch_mlp]
    model.freeze()
    utils.linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    names = sorted(name for name, _ in nn.utils.tree_flatten(model.trainable_parameters()) if "layers" not in name)
    assert names == [f"switch_mlp.{part}_proj.lora_{f}" for part in ("down", "gate", "up") for f in "ab"]
    for part in ("gate_proj", "up_proj", "down_proj"):
        layer = model.switch_mlp[part]
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(4)) * 0.1
    adapted = BE.to_numpy(model(x))
    for part in ("gate_proj", "up_proj", "down_proj"):
        model.switch_mlp[part] = model.switch_mlp[part].fuse()  # as mlx-lm's `fuse`
    assert equal(BE.to_numpy(model(x)), adapted)
    with pytest.raises(qkit.StageError, match="no dropout"):
        model.switch_mlp.up_proj.to_lora(r=4, dropout=0.1)


# kv_b_proj


class Attention(nn.Module):
    """The two halves of `kv_b_proj` that mlx-lm has."""

    def __init__(self):
        super().__init__()
        self.embed_q = mla.MultiLinear(32, 64, 4)
        self.unembed_out = mla.MultiLinear(64, 48, 4)

    def __call__(self, x, q):
        return self.embed_q(q), self.embed_q(x, transpose=False), self.unembed_out(x)


def joined(model):
    keys, values = np.array(model.embed_q.weight).swapaxes(-1, -2), np.array(model.unembed_out.weight)
    return np.concatenate([keys, values], axis=1).reshape(-1, 64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_halves_of_kv_b_proj_are_one_layer_with_its_codes(grid):
    mx.random.seed(0)
    model = Attention()
    w = joined(model)
    x, q = mx.random.normal((2, 1, 5, 64)), mx.random.normal((2, 4, 5, 32))
    want = law.quantize(w, grid)
    values = law.dequantize(want).reshape(4, 80, 64)
    float_model = copy.deepcopy(model)
    float_model.embed_q.weight = mx.array(np.ascontiguousarray(values[:, :32].swapaxes(-1, -2)))
    float_model.unembed_out.weight = mx.array(np.ascontiguousarray(values[:, 32:]))
    prepared = qkit.prepare(model, Recipe("test", (Rule(("kv_b_proj",), weight=grid),)))
    assert all(equal(BE.to_numpy(a), BE.to_numpy(b)) for a, b in zip(prepared(x, q), float_model(x, q), strict=True))
    evaluated = prepared.eval()(x, q)
    converted = qkit.convert(prepared)
    (layer,) = BE.layers(converted)
    assert (layer.path, layer.shape) == ("kv_b_proj", (320, 64))
    found = BE.unpack(layer.module)
    assert all(equal(BE.to_numpy(part), want.parts()[name]) for name, part in found.parts().items())
    for mine, theirs, plain in zip(evaluated, converted(x, q), float_model(x, q), strict=True):
        assert equal(BE.to_numpy(mine), BE.to_numpy(theirs))
        assert float(mx.abs(mine - plain).max()) <= 1e-6 * float(mx.abs(plain).max())  # other orders of sums


def test_kv_b_proj_refuses_a_grid_for_its_inputs():
    rule = Rule(("*",), weight=Grid("int8", "row"), activation=Grid("int8", "row"))
    with pytest.raises(qkit.BackendError, match="kv_b_proj: mlx-lm multiplies its heads in another order"):
        qkit.prepare(Attention(), Recipe("test", (rule,)))
