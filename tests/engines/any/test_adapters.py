"""Adapters: one law of the merged weight on every engine, and nothing lost by merging."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from models import build
from tables import BUILDERS as ENGINES

import qkit
from qkit import adapters
from qkit.adapters import Adapter, Update
from qkit.adapters.surgery import base_weights, put
from qkit.engines.protocol import Modules
from qkit.engines.trainer import TrainerOptions
from qkit.qtensor import DTYPES
from qkit.reference import merged as arithmetic

TOKENS = np.random.default_rng(1).integers(0, 256, (4, 17)).astype(np.int32)
KINDS = ["lora", "dora"]
RECIPES = ["int4-g64", "int6-g64", "int8-g64", "mxfp4-a16", "mxfp4", "int8-dynamic-act-int4-weight", "nvfp4-a16"]
needs_engines = pytest.mark.skipif(len(ENGINES) < 2, reason="one engine only")


def update(shape, *, kind, rank=5, scale=0.7, seed=0):
    """An update of the size of a weight's own values, with a row of zeros in B."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, shape[1])), random.standard_normal((shape[0], rank))
    b[1] = 0
    magnitude = np.abs(random.standard_normal(shape[0])) + 0.5
    floats = [array.astype(np.float32) for array in (a, b, magnitude)]
    return Update(floats[0], floats[1], scale, floats[2] if kind == "dora" else None)


def weight(shape, dtype, seed=3):
    """A weight with a row of zeros."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[1] = 0
    return w.astype(dtype)


def adapted(name, recipe, kind, *, base, **changes):
    """A Llama with adapters that nobody trained, and its engine."""
    engine, model = qkit.backend(name), build(name, **changes)
    model = qkit.prepare(model, recipe) if base == "prepared" else qkit.convert(model, recipe)
    model = qkit.adapt(model, Adapter(rank=4, alpha=10.0, kind=kind))
    random = np.random.default_rng(2)
    updates = {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}
    for path, one in updates.items():
        b = (random.standard_normal(one.b.shape) * 0.05).astype(np.float32)
        updates[path] = replace(one, b=b)
    return engine, put(engine, qkit.merge(model), updates)


def trained(name, recipe, kind, *, base):
    """The same, trained a little."""
    engine, model = adapted(name, recipe, kind, base=base)
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0))
    for _ in range(2):
        trainer.step([TOKENS], learning_rate=2e-2)
    return engine, model


def codes(engine, model):
    """The codes and scales of every converted layer."""
    held = {
        layer.path: engine.unpack(layer.module).map(engine.to_numpy) for layer in engine.layers(model) if layer.rule
    }
    return {(path, name): array for path, q in held.items() for name, array in q.parts().items()}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name in some:
        np.testing.assert_array_equal(some[name], others[name], err_msg=str(name))


# The law


def test_products_of_shortened_factors_are_exact():
    random = np.random.default_rng(0)
    x, y = (arithmetic.shorten(random.standard_normal(1000).astype(np.float32)) for _ in range(2))
    for a, b, product in zip(x.tolist(), y.tolist(), (x * y).tolist(), strict=True):
        assert Fraction(a) * Fraction(b) == Fraction(product)


def test_shortening_rounds_to_twelve_bits_ties_to_even():
    ulp = 2.0**-11
    x = np.array([1, 1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp * 0.51, -(1 + ulp / 2), 0], np.float32)
    np.testing.assert_array_equal(arithmetic.shorten(x), np.array([1, 1, 1 + 2 * ulp, 1 + ulp, -1, 0], np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_is_near_to_the_formula(kind):
    one, w = update((24, 40), kind=kind), weight((24, 40), np.float32)
    v = w.astype(np.float64) + one.scale * one.b.astype(np.float64) @ one.a
    if kind == "dora":
        v *= (one.magnitude / np.maximum(np.linalg.norm(v, axis=1), 1e-20))[:, None]
    np.testing.assert_allclose(
        arithmetic.merged(w, one), v, rtol=0, atol=2**-11 * np.abs(v).max()
    )  # 12 bits of each factor


@pytest.mark.parametrize("columns", [32, 96])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_merges_the_same_bits(name, kind, dtype, columns):
    engine = qkit.backend(name)
    one, w = update((16, columns), kind=kind), weight((16, columns), dtype)
    layer = engine.make_layer("linear", w)
    prepared = engine.prepare_layer(layer, qkit.recipe("int4-g32").rules[-1])
    module = engine.adapt(prepared, one)
    want = arithmetic.merged(w, one).astype(w.dtype)
    np.testing.assert_array_equal(engine.to_numpy(module.merged()), want)
    np.testing.assert_array_equal(engine.to_numpy(engine.weight(engine.merge_adapter(module))), want)


@pytest.mark.parametrize(("kind", "dtype"), [("dora", "float32"), ("lora", "float16"), ("dora", "bfloat16")])
@pytest.mark.parametrize("name", ENGINES)
def test_compiling_changes_no_bit_of_a_merge(name, kind, dtype):
    engine = qkit.backend(name)
    one, w = update((16, 96), kind=kind), weight((16, 96), dtype)
    module = engine.adapt(engine.prepare_layer(engine.make_layer("linear", w), qkit.recipe("int4-g32").rules[-1]), one)
    rounded = engine.compile(lambda: (engine.fake_quantize(module.merged(), qkit.Grid("int4", 32)),))
    want = qkit.fake_quantize(arithmetic.merged(w, one).astype(w.dtype), qkit.Grid("int4", 32))
    np.testing.assert_array_equal(engine.to_numpy(rounded()[0]), want)


# Merging


def check_merge(engine, model, *, start):
    """Merges, and checks that codes, logits and loss stay; the codes are those of the law, and not those of `start`."""
    loss, logits = engine.loss(model, TOKENS), engine.logits(model, TOKENS[:, :-1])
    want = {}
    for layer in engine.layers(model):
        if layer.adapter:
            merged = arithmetic.merged(
                next(base_weights(engine, layer, "weight", spread=layer.stage == "converted")),
                engine.adapter_update(layer.module),
            )
            if layer.stage == "prepared":  # its master is stored in the model's type
                merged = merged.astype(engine.to_numpy(engine.weight(layer.module)).dtype)
            want |= {
                (layer.path, name): array for name, array in qkit.quantize(merged, layer.rule.weight).parts().items()
            }
    prepared = any(layer.stage == "prepared" for layer in engine.layers(model))
    model = qkit.merge(model)
    assert engine.loss(model, TOKENS) == loss
    if prepared:
        model = qkit.convert(model)
    assert engine.loss(model, TOKENS) == loss
    np.testing.assert_array_equal(engine.logits(model, TOKENS[:, :-1]), logits)
    held = codes(engine, model)
    assert_same(held, want)
    assert any((held[key] != start[key]).any() for key in held)


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ENGINES)
def test_merging_changes_no_loss_and_no_code(name, recipe, base):
    engine, model = adapted(name, recipe, KINDS[len(recipe) % 2], base=base)
    check_merge(engine, model, start=codes(engine, qkit.convert(build(name), recipe)))


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ENGINES)
def test_nor_in_half_precision(name, dtype, base):
    engine, model = adapted(name, "int4-g64", "dora", base=base, dtype=dtype)
    check_merge(engine, model, start=codes(engine, qkit.convert(build(name, dtype=dtype), "int4-g64")))


@pytest.mark.parametrize(("kind", "base"), [("lora", "prepared"), ("dora", "converted")])
@pytest.mark.parametrize("name", ENGINES)
def test_nor_after_training(name, kind, base):
    engine, model = trained(name, "int4-g64", kind, base=base)
    check_merge(engine, model, start=codes(engine, qkit.convert(build(name), "int4-g64")))


@needs_engines
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_on_another_engine_has_the_same_codes(kind):
    engine, model = trained(ENGINES[0], "int4-g64", kind, base="prepared")
    updates = {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}
    here = codes(engine, qkit.convert(qkit.merge(model)))
    other = qkit.backend(ENGINES[1])
    there = put(other, qkit.prepare(build(ENGINES[1]), "int4-g64"), updates)
    assert_same(here, codes(other, qkit.convert(qkit.merge(there))))


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENGINES)
def test_an_adapter_changes_nothing_before_it_is_trained(name, kind, base):
    engine, model = qkit.backend(name), build(name)
    model = qkit.prepare(model, "int4-g64") if base == "prepared" else qkit.convert(model, "int4-g64")
    before = engine.logits(model, TOKENS)
    np.testing.assert_array_equal(engine.logits(qkit.adapt(model, Adapter(kind=kind)), TOKENS), before)


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("name", ENGINES)
def test_only_the_adapter_trains(name, base):
    engine, model = qkit.backend(name), build(name)
    model = qkit.prepare(model, "int4-g64") if base == "prepared" else qkit.convert(model, "int4-g64")
    model = qkit.adapt(model, Adapter(kind="dora"))
    before = {key: engine.to_numpy(array).copy() for key, array in engine.tensors(model).items()}
    engine.trainer(model, TrainerOptions(weight_decay=0.0)).step([TOKENS], learning_rate=1e-2)
    after = {key: engine.to_numpy(array) for key, array in engine.tensors(model).items()}
    changed = {key.rpartition(".")[2] for key in before if (before[key] != after[key]).any()}
    factors = {"lora_B", "lora_magnitude"} if name == "torchao" else {"lora_b", "m"}  # A has no slope as B is zero
    norms = {key for key in before if key.endswith("norm.weight")}
    assert changed == factors | ({"weight"} if base == "converted" else set())
    assert {key for key in before if key.endswith("weight") and (before[key] != after[key]).any()} <= norms


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("recipe", "stage", "changes", "columns"),
    [
        ("int2-g64", qkit.convert, {}, 6),
        ("int2-g64", qkit.prepare, {}, 3),
        ("int2-g64", qkit.convert, {"wider": 1}, 3),
        ("int2-g64", qkit.convert, {"rank": 100}, 128),  # no weight has more rows
        ("int3-g64", qkit.convert, {}, 3),
        ("int4-g64", qkit.convert, {"wider": 4}, 12),
        ("mxfp4-a16", qkit.convert, {}, 3),
    ],
)
def test_products_on_codes_of_two_bits_are_wider_than_their_rank(name, recipe, stage, changes, columns):
    engine, model = qkit.backend(name), stage(build(name), recipe)
    model = qkit.adapt(model, Adapter(**{"rank": 3, "alpha": 6.0, **changes}))
    updates = [engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter]
    assert {update.rank for update in updates} == {columns}
    assert {update.scale for update in updates} == {6.0 / changes.get("rank", 3)}


@pytest.mark.parametrize("wider", [0, 1.5, True])
def test_a_width_that_makes_no_sense_is_refused(wider):
    with pytest.raises(qkit.QkitError, match=r"adapter wider is .*: give a whole number from 1 on"):
        Adapter(wider=wider)


def test_the_first_values_are_the_same_on_every_engine_and_follow_the_seed():
    def first(name, seed):
        engine = qkit.backend(name)
        model = qkit.adapt(qkit.prepare(build(name), "int4-g64"), Adapter(seed=seed))
        return {layer.path: engine.adapter_update(layer.module).a for layer in engine.layers(model) if layer.adapter}

    one = first(ENGINES[0], 0)
    assert_same(one, first(ENGINES[-1], 0))
    other = first(ENGINES[0], 1)
    assert all((one[path] != other[path]).any() for path in one)
    assert len({a.tobytes() for a in one.values()}) == len(one)
    for a in one.values():
        assert 0.9 < np.abs(a).max() * a.shape[1] ** 0.5 <= 1


# The rest of the model


@pytest.mark.parametrize("name", ENGINES)
def test_coverage_shows_adapters(name):
    model = qkit.prepare(build(name), "int4-g64")
    model = qkit.adapt(model, Adapter(rank=3, match=("*.q_proj",)))
    model = qkit.adapt(model, Adapter(rank=2, kind="dora", match=("*.0.*.v_proj",)))
    states = {row.path: row.state for row in qkit.coverage(model).rows}
    assert states["model.layers.1.self_attn.q_proj"] == "prepared, lora, rank 3"
    assert states["model.layers.0.self_attn.v_proj"] == "prepared, dora, rank 2"
    assert states["model.layers.1.self_attn.v_proj"] == "prepared"
    assert "lora" not in str(qkit.coverage(qkit.merge(model)))


@pytest.mark.parametrize("name", ENGINES)
def test_switching_off_leaves_the_float_merged_weight(name):
    engine, model = adapted(name, "int3-g64", "lora", base="prepared")
    on = engine.logits(model, TOKENS)
    with qkit.disabled(model):
        off = engine.logits(model, TOKENS)
    assert (on != off).any()
    model = qkit.merge(model)
    with qkit.disabled(model):
        np.testing.assert_array_equal(engine.logits(model, TOKENS), off)


@pytest.mark.parametrize("name", ENGINES)
def test_static_ranges_survive_a_merge(name):
    engine = qkit.backend(name)
    model = qkit.prepare(build(name), "int8-static-act-int8-weight")
    with qkit.calibrating(model):
        engine.logits(model, TOKENS)
    updates = {layer.path: update(layer.shape, kind="lora", scale=0.01) for layer in engine.layers(model) if layer.rule}
    model = put(engine, model, updates)
    loss = engine.loss(model, TOKENS)
    model = qkit.convert(qkit.merge(model))
    assert engine.loss(model, TOKENS) == loss
    model = put(engine, model, updates)  # once more, on what is converted
    twice = engine.loss(model, TOKENS)
    assert engine.loss(qkit.merge(model), TOKENS) == twice != loss


@pytest.mark.parametrize("name", ENGINES)
def test_what_cannot_be_done_with_an_adapter_on_is_refused(name, tmp_path):
    model = qkit.adapt(qkit.prepare(build(name), "int4-g64"), Adapter())
    with pytest.raises(qkit.StageError, match=r"cannot convert: model\.layers\.0\.\S+ has an adapter .*qkit.merge"):
        qkit.convert(model)
    with pytest.raises(qkit.StageError, match=r"has an adapter already \(lora, rank 8\): merge that first"):
        qkit.adapt(model, Adapter())
    converted = qkit.adapt(qkit.convert(build(name), "int4-g64"), Adapter())
    with pytest.raises(qkit.StageError, match=r"cannot save: .* has an adapter"):
        qkit.save(converted, tmp_path / "out")
    with pytest.raises(qkit.StageError, match="no layer of this model has an adapter"):
        qkit.merge(build(name))


@pytest.mark.parametrize(
    ("recipe", "match", "says"),
    [
        ("int4-g64", ("lm_head",), "lm_head cannot take an adapter: it is not quantized: prepare or convert it"),
        ("int4-g64-all", ("*.embed_tokens",), r"model.embed_tokens cannot .* it is an embedding"),
        ("int4-g64", ("*.nothing",), r"no layer matches \*.nothing: there is model"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_layers_that_cannot_take_one_are_refused_by_name(name, recipe, match, says):
    with pytest.raises(qkit.StageError, match=says):
        qkit.adapt(qkit.prepare(build(name), recipe), Adapter(match=match))


@pytest.mark.skipif("torchao" not in ENGINES, reason="in MLX a tied head is no layer of its own")
def test_a_tied_head_is_refused_and_can_be_left_out():
    model = qkit.prepare(build("torchao", tie_word_embeddings=True), "int4-g64-all")
    with pytest.raises(qkit.StageError, match=r"lm_head cannot .* that of model.embed_tokens.* leave it out, or untie"):
        qkit.adapt(model, Adapter())
    assert "lora" in str(qkit.coverage(qkit.adapt(model, Adapter(match=("model.layers.*",)))))


@pytest.mark.parametrize("name", ENGINES)
def test_a_converted_base_whose_values_would_move_is_refused(name):
    with pytest.raises(qkit.StageError, match=r"q_proj cannot .* int4-g64-midmax, where values .* move"):
        qkit.adapt(qkit.convert(build(name), "int4-g64-midmax"), Adapter())


def test_an_engine_without_adapters_says_so():
    verbs = {verb: getattr(type(qkit.backend(ENGINES[0])), verb) for verb in dir(Modules) if verb[0] != "_"}
    few = type("Few", (), {"name": "few", **verbs})()
    with pytest.raises(qkit.BackendError, match="'few' cannot train adapters: it lacks adapt, adapter_update"):
        qkit.adapt(None, Adapter(), backend=few)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"kind": "vera"}, "kind is 'vera': choose one of lora, dora"),
        ({"match": "*"}, "match is"),
        ({"match": ()}, "match is"),
        ({"match": ["*"]}, "match is"),
        ({"alpha": "16"}, "alpha is '16'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(wish, says):
    with pytest.raises(qkit.QkitError, match=says):
        Adapter(**wish)


def test_a_wish_is_read_from_a_table():
    assert adapters.adapter_from_table({}) == Adapter()
    assert adapters.adapter_from_table({"rank": 4, "match": ["a", "b"]}) == Adapter(rank=4, match=("a", "b"))
    assert adapters.adapter_from_table({"match": "a"}) == Adapter(match=("a",))
    with pytest.raises(qkit.QkitError, match="unknown key 'r' in an adapter: there is rank, alpha, kind, match, seed"):
        adapters.adapter_from_table({"r": 4})
    with pytest.raises(qkit.QkitError, match="match is 3"):
        adapters.adapter_from_table({"match": 3})


@pytest.mark.parametrize("name", ENGINES)
def test_a_rank_above_that_of_the_weight_is_refused(name):
    with pytest.raises(qkit.QkitError, match=r"q_proj: rank 129 is more than its weight of 128 x 128 has"):
        qkit.adapt(qkit.prepare(build(name), "int4-g64"), Adapter(rank=129))
