"""Adapters, learned scales, output grids and static ranges of experts, on every engine that has mixtures."""

import zlib

import numpy as np
import pytest
from alike import equal
from models import make
from tables import MODULES

import qkit
from qkit import Adapter, Grid, Recipe, Rule, adapters
from qkit.code_changes import code_sums
from qkit.engines.trainer import TrainerOptions
from qkit.storage.arrays import read_file

pytest.importorskip("transformers")

ENGINES = [name for name in ("torchao", "mlx") if name in MODULES]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
TOKENS = np.random.default_rng(3).integers(0, 256, (2, 20)).astype(np.int32)
LINEAR = Rule(("*",), weight=Grid("int4", 32))
FILES = {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    place = tmp_path_factory.mktemp("float")
    return {family: make(place / family, family) for family in FAMILIES}


def recipe(**rule):
    given = {"weight": Grid("int4", 32), **rule}
    return Recipe("test", (Rule(("lm_head",)), LINEAR, Rule(("*",), "experts", **given)))


def trained(engine, model, steps=2):
    """`model` after a few steps, and their losses."""
    options = TrainerOptions(weight_decay=0.01)
    trainer = engine.trainer(model, options)
    return [trainer.step([TOKENS], learning_rate=1e-2) for _ in range(steps)]


def learned(engine, model):
    """Copies of the learned scales of all experts."""
    blocks = [engine.learned_experts(layer.module) for layer in engine.layers(model) if layer.kind == "experts"]
    return [engine.to_numpy(one).copy() for block in blocks for mine in block.values() for one in mine.values()]


def adapted(engine, model, **options):
    model = qkit.adapt(model, Adapter(rank=4, match=("*.experts", "*.q_proj"), **options))
    assert any(layer.adapter for layer in engine.layers(model) if layer.kind == "experts")
    return model


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("e2m1", 16, "nvfp4"), Grid("int8", "tensor")], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("stage", ["prepare", "convert"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ENGINES)
def test_the_merge_of_adapted_experts_moves_no_logit(backend, family, stage, kind, grid, sources):
    engine = qkit.backend(backend)
    model = getattr(qkit, stage)(qkit.load(sources[family], backend=backend), recipe(weight=grid))
    before = engine.logits(model, TOKENS)
    model = adapted(engine, model, kind=kind)
    if kind == "lora" and grid.by_rows and stage == "prepare":
        assert equal(engine.logits(model, TOKENS), before)  # B begins at zero
    losses = trained(engine, model)
    assert losses[1] < losses[0]
    logits = engine.logits(model, TOKENS)
    assert not equal(logits, before)
    model = qkit.merge(model)
    assert equal(engine.logits(model, TOKENS), logits)
    if stage == "prepare":
        model = qkit.convert(model)
        assert equal(engine.logits(model, TOKENS), logits)
    assert not any(layer.adapter or layer.stage == "prepared" for layer in engine.layers(model))


@pytest.mark.parametrize("layout", ["peft", "mlx-lm"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_experts_pass_through_files_between_engines(family, kind, layout, sources, tmp_path):
    logits = {}
    for backend in ENGINES:
        engine = qkit.backend(backend)
        model = qkit.prepare(qkit.load(sources[family], backend=backend), recipe())
        if backend == ENGINES[0]:
            model = adapted(engine, model, kind=kind)
            trained(engine, model)
            adapters.save(model, tmp_path / "adapter", layout=layout)
        else:
            model = adapters.load(model, tmp_path / "adapter")
            adapters.save(model, tmp_path / "again", layout=layout)
            one, other = (read_file(tmp_path / name / FILES[layout])[0] for name in ("adapter", "again"))
            assert one.keys() == other.keys()
            assert all(equal(one[name], other[name]) for name in one)
        logits[backend] = engine.logits(qkit.convert(qkit.merge(model)), TOKENS)
    first, *others = logits.values()
    for other in others:
        assert np.abs(first - other).max() <= 3e-6 * np.abs(first).max()  # float32 products, summed in another order


@pytest.mark.parametrize(
    "grid", [Grid("int4", 32), Grid("int4", 32, "minmax"), Grid("e4m3", 32), Grid("int8", "tensor")], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ENGINES)
def test_experts_learn_their_scales_and_deploy_without_a_gap(backend, family, grid, sources, tmp_path):
    engine = qkit.backend(backend)
    model = qkit.prepare(qkit.load(sources[family], backend=backend), recipe(weight=grid, scales="learned"))
    mixing = [layer.module for layer in engine.layers(model) if layer.kind == "experts"]
    before = [
        engine.to_numpy(one).copy()
        for module in mixing
        for p in engine.learned_experts(module).values()
        for one in p.values()
    ]
    losses = trained(engine, model)
    assert losses[1] < losses[0]
    mixing = [layer.module for layer in engine.layers(model) if layer.kind == "experts"]
    after = [
        engine.to_numpy(one) for module in mixing for p in engine.learned_experts(module).values() for one in p.values()
    ]
    assert any(not equal(one, other) for one, other in zip(before, after, strict=True))
    logits = engine.logits(model, TOKENS)
    model = qkit.convert(model)
    assert equal(engine.logits(model, TOKENS), logits)
    qkit.save(model, tmp_path / "out", source=sources[family])
    assert equal(engine.logits(qkit.load(tmp_path / "out", backend=backend), TOKENS), logits)


def test_learned_scales_of_experts_begin_and_end_alike_on_every_engine(sources, tmp_path):
    codes = {}
    for backend in ENGINES:
        rule = {"weight": Grid("int4", 32), "scales": "learned"}
        model = qkit.convert(qkit.prepare(qkit.load(sources["mixtral"], backend=backend), recipe(**rule)))
        plain = qkit.convert(qkit.load(sources["mixtral"], backend=backend), recipe())
        for one in (model, plain):
            qkit.save(one, tmp_path / "out", source=sources["mixtral"])
            found = read_file(tmp_path / "out" / "model.safetensors")[0]
            assert all(equal(found[name], other) for name, other in codes.setdefault("first", found).items())


STATIC = {
    "activation": Grid("int8", "tensor"),
    "output": Grid("int8", "tensor"),
    "range": "calibrated",
    "weight": Grid("int8", "row"),
}
DYNAMIC = {"activation": Grid("int8", "row"), "output": Grid("int8", "row"), "weight": Grid("int8", "row")}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(
    "rule", [STATIC, {**STATIC, "range": "average"}, DYNAMIC], ids=["calibrated", "average", "dynamic"]
)
def test_grids_of_outputs_and_static_ranges_of_experts_deploy_without_a_gap(rule, backend, family, sources, tmp_path):
    engine = qkit.backend(backend)
    model = qkit.prepare(qkit.load(sources[family], backend=backend), recipe(**rule))
    if rule.get("range") == "calibrated":
        with qkit.calibrating(model, all_experts=True):
            engine.logits(model, TOKENS)
    losses = trained(engine, model, steps=8 if rule.get("range") == "average" else 2)
    assert losses[-1] < losses[0]
    logits = engine.logits(model, TOKENS)
    off = qkit.prepare(qkit.load(sources[family], backend=backend), recipe(weight=rule["weight"]))
    assert not equal(engine.logits(off, TOKENS), logits)
    model = qkit.convert(model)
    assert equal(engine.logits(model, TOKENS), logits)
    qkit.save(model, tmp_path / "out", source=sources[family])
    assert equal(engine.logits(qkit.load(tmp_path / "out", backend=backend), TOKENS), logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_static_ranges_of_experts_are_the_same_on_every_engine(family, sources):
    found = {}
    for backend in ENGINES:
        engine = qkit.backend(backend)
        model = qkit.prepare(qkit.load(sources[family], backend=backend), recipe(**STATIC))
        with qkit.calibrating(model, all_experts=True):
            engine.logits(model, TOKENS)
        layer = next(layer for layer in engine.layers(model) if layer.kind == "experts")
        found[backend] = {name: engine.to_numpy(one) for name, one in engine.expert_ranges(layer.module).items()}
    first, *others = found.values()
    for other in others:
        assert other.keys() == first.keys()
        for name, ranges in first.items():
            assert np.allclose(other[name], ranges, rtol=1e-5, atol=1e-6), name  # sums of float32 in another order


@pytest.mark.parametrize("scales", ["rule", "learned"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ENGINES)
def test_unprepare_gives_float_experts_back(backend, family, scales, sources):
    engine = qkit.backend(backend)
    model = qkit.load(sources[family], backend=backend)
    names, logits = set(engine.tensors(model)), engine.logits(model, TOKENS)
    model = qkit.prepare(model, recipe(scales=scales))
    assert not equal(engine.logits(model, TOKENS), logits)
    model = qkit.unprepare(model, "*.experts")
    assert {layer.stage for layer in engine.layers(model) if layer.kind == "experts"} == {"float"}
    model = qkit.unprepare(model)
    assert set(engine.tensors(model)) == names
    assert equal(engine.logits(model, TOKENS), logits)


@pytest.mark.parametrize("scales", ["rule", "learned", "adapted"])
@pytest.mark.parametrize("backend", ENGINES)
def test_sums_of_codes_are_those_of_the_experts_that_deploy(backend, scales, sources):
    engine = qkit.backend(backend)
    rule = {"scales": "learned"} if scales == "learned" else {}
    model = qkit.prepare(qkit.load(sources["mixtral"], backend=backend), recipe(**rule))
    if scales == "adapted":
        model = qkit.adapt(model, Adapter(rank=4, match=("*.experts",)))
    before = code_sums(model)
    trained(engine, model, steps=3)
    after = code_sums(model)
    experts = {layer.path for layer in engine.layers(model) if layer.kind == "experts"}
    assert experts <= {path for path in before if before[path] != after[path]}
    model = qkit.convert(qkit.merge(model) if scales == "adapted" else model)
    for layer in engine.layers(model):
        if layer.kind == "experts":
            each = engine.unpack_experts(layer.module).values()
            codes = b"".join(engine.to_numpy(q.codes).tobytes() for mine in each for q in mine)
            assert zlib.crc32(codes) == after[layer.path]
