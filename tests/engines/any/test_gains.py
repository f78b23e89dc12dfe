"""Scales that train beside the factors of adapters on codes: one law on every engine, and nothing lost by merging."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from models import build
from safetensors.numpy import load_file, save_file
from tables import BUILDERS as ENGINES

import qkit
from qkit import adapters, reference
from qkit.adapters import Adapter
from qkit.adapters.surgery import base_weights, put
from qkit.engines.trainer import TrainerOptions
from qkit.grid import INTEGER_RULES
from qkit.qtensor import QTensor
from qkit.reference import gains as law
from qkit.reference import merged as arithmetic
from qkit.reference import stored
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors

PACKAGES = {"torchao": "qkit_torchao", "mlx": "qkit_mlx"}
KNOWN = [name for name in ENGINES if name in PACKAGES]
TOKENS = np.random.default_rng(1).integers(0, 256, (4, 17)).astype(np.int32)
READ = [grid for grid in read_grids() if law.takes_gains(grid)]
OWN = [qkit.Grid("int4", group, rule) for rule in INTEGER_RULES for group in (32, "row")]
known_engines = pytest.mark.parametrize("name", KNOWN)


def gains_of(grid, shape):
    """Gains of all sizes, beyond the limits too."""
    found = np.random.default_rng(4).standard_normal(law.gains_shape(grid, shape)).astype(np.float32) * np.float32(0.05)
    found[:4] = np.array([-1.0, 3.0, 0.0, 1e38], np.float32)[:, None, None]
    return found


def own_tensors(grid):
    """A weight on one of qkit's own grids, with a row of zeros, a very small and a very large one."""
    w = np.random.default_rng(5).standard_normal((6, 128)).astype(np.float32)
    w[1], w[2], w[3] = 0, w[2] * np.float32(1e-29), w[3] * np.float32(1e38 / np.abs(w[3]).max())
    return [reference.quantize(w, grid)]


@known_engines
@pytest.mark.parametrize("grid", [*READ, *OWN], ids=str)
def test_every_engine_multiplies_scales_as_the_law(name, grid):
    engine = qkit.backend(name)
    mine = import_module(f"{PACKAGES[name]}.arithmetic.gains")
    for q in read_tensors(grid) if grid.read else own_tensors(grid):
        some = gains_of(grid, q.shape)
        for gains in (some, -some, np.zeros_like(some)):
            want = law.gained(q, gains)
            made = mine.gained(q.map(engine.from_numpy), engine.from_numpy(gains))
            assert engine.to_numpy(made.scales).tobytes() == want.scales.tobytes()
            assert want.scales.dtype == q.scales.dtype
            assert np.isfinite(want.scales.astype(np.float32)).all()
            assert np.array_equal(np.signbit(want.scales), np.signbit(q.scales))
            assert gains.any() or want.scales.tobytes() == q.scales.tobytes()
            if grid.has_biases:
                assert engine.to_numpy(made.biases).tobytes() == want.biases.tobytes()
                assert want.biases.dtype == q.biases.dtype
                assert np.isfinite(want.biases.astype(np.float32)).all()
                assert (want.biases.tobytes() == q.biases.tobytes()) != gains.any()


@pytest.mark.parametrize("grid", [grid for grid in OWN if grid.scale in ("signed", "absmax")], ids=str)
def test_values_on_scaled_rows_keep_codes_and_scales_when_they_are_quantized_again(grid):
    """So that adapters can go on from an artifact of them. Under the other rules no values have their own scales again."""
    w = np.random.default_rng(6).standard_normal((6, 128)).astype(np.float32)
    q = law.gained(reference.quantize(w, grid), gains_of(grid, (6, 128)))
    again = reference.quantize(reference.dequantize(q), grid)
    assert np.array_equal(reference.dequantize(again), reference.dequantize(q))


def bases(name, base, **changes):
    """A model of codes: on a grid of qkit's own, or with the scales and biases of a file, in bfloat16."""
    engine, model = qkit.backend(name), build(name, **changes)
    if not base:
        return engine, qkit.convert(model, "int4-g64")
    floats = {layer.path: layer for layer in engine.layers(model)}
    rules = {layer.path: layer.rule for layer in engine.layers(qkit.prepare(build(name, **changes), "int4-g64"))}
    return engine, engine.replace(
        model, {path: affine(engine, floats[path], rule) for path, rule in rules.items() if rule is not None}
    )


def affine(engine, layer, rule):
    """A layer of codes on the grid of MLX: biases are no whole number of scales."""
    w = engine.to_numpy(engine.weight(layer.module))
    q = reference.quantize(w, qkit.Grid("int4", 64, "minmax"))
    biases = (0.3 - q.zeros.astype(np.float32)) * q.scales
    scales, biases = (array.astype(reference.rounding.DTYPE["bfloat16"]) for array in (q.scales, biases))
    read = QTensor(q.codes, scales, qkit.Grid("int4", 64, "affine"), q.dtype, biases=biases)
    return engine.pack(layer.module, read.map(engine.from_numpy), replace(rule, weight=read.grid))


def trained(name, base, kind="lora", *, parts=("off", "on"), **changes):
    """A Llama of codes whose adapters and scales trained a little, beside the base and on the grid."""
    engine, model = bases(name, base, **changes)
    model = qkit.adapt(model, Adapter(rank=4, alpha=10.0, kind=kind, scales="learned"))
    trainer = engine.trainer(model, TrainerOptions(weight_decay=0.0))
    for mode in parts:
        for layer in engine.layers(model):
            if layer.adapter:
                engine.switch_mode(layer.module, mode)
        for _ in range(3):
            trainer.step([TOKENS], learning_rate=1e-2)
    return engine, model


def held(engine, model):
    return {one.path: engine.unpack(one.module).map(engine.to_numpy) for one in engine.layers(model) if one.rule}


def by_law(engine, layer):
    """The codes and scales that the law gives an adapted layer."""
    update, first = engine.adapter_update(layer.module), engine.unpack(layer.module).map(engine.to_numpy)
    merged = arithmetic.merged(next(base_weights(engine, layer, "weight", spread=True)), update)
    q = stored.requantize(merged, first) if first.grid.read else reference.quantize(merged, first.grid)
    return law.gained(q, update.gains)


def assert_same(some, others):
    for part, array in others.parts().items():
        assert np.array_equal(some.parts()[part], array), part


@known_engines
@pytest.mark.parametrize("base", ["", "affine"])
@pytest.mark.parametrize(("kind", "dtype"), [("lora", "float32"), ("dora", "float32"), ("lora", "bfloat16")])
def test_a_merge_stores_the_codes_and_scales_of_the_law_without_a_gap(name, base, kind, dtype):
    engine, model = trained(name, base, kind, dtype=dtype)
    loss, logits = engine.loss(model, TOKENS), engine.logits(model, TOKENS[:, :-1])
    want = {layer.path: by_law(engine, layer) for layer in engine.layers(model) if layer.adapter}
    first = {
        layer.path: engine.unpack(layer.module).map(engine.to_numpy) for layer in engine.layers(model) if layer.adapter
    }
    model = qkit.merge(model)
    assert engine.loss(model, TOKENS) == loss
    assert np.array_equal(engine.logits(model, TOKENS[:, :-1]), logits)
    found = held(engine, model)
    for path, q in want.items():
        assert_same(found[path], q)
        assert (found[path].scales != first[path].scales).any()
        if base:
            assert (found[path].biases != first[path].biases).any()


@pytest.mark.skipif(len(KNOWN) < 2, reason="one engine only")
@pytest.mark.parametrize("base", ["", "affine"])
def test_engines_take_the_same_steps_and_a_merge_on_the_other_is_the_same(base):
    (one, mine), (other, _) = trained("torchao", base), trained("mlx", base)
    updates = {layer.path: one.adapter_update(layer.module) for layer in one.layers(mine) if layer.adapter}
    _, fresh = bases("mlx", base)
    moved = qkit.merge(put(other, fresh, updates))
    for path, q in held(one, qkit.merge(mine)).items():
        assert_same(held(other, moved)[path], q)


@known_engines
@pytest.mark.parametrize("base", ["", "affine"])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_the_gradient_of_a_gain_is_that_of_the_law(name, base, mode):
    """Of the sum of outputs times numbers: through the codes of the merged weight, or of the base that it is beside."""
    engine, model = trained(name, base, parts=(mode,))
    layer = next(layer for layer in engine.layers(model) if layer.adapter)
    random = np.random.default_rng(8)
    x, g = (random.standard_normal((5, n)).astype(np.float32) for n in reversed(layer.shape))
    update = engine.adapter_update(layer.module)
    no_gains = replace(update, gains=np.zeros_like(update.gains))
    first = engine.unpack(layer.module).map(engine.to_numpy)
    merged = arithmetic.merged(next(base_weights(engine, layer, "weight", spread=True)), no_gains)
    on = stored.requantize(merged, first) if first.grid.read else reference.quantize(merged, first.grid)
    want = law.to_gains(g.T @ x, on if mode == "on" else first, update.gains.shape)
    np.testing.assert_allclose(
        gradient_of_gains(name, layer.module, x, g), want, rtol=0, atol=1e-4 * np.abs(want).max()
    )
    assert want.shape == law.gains_shape(first.grid, layer.shape)


def gradient_of_gains(name, module, x, g):
    if name == "torchao":
        import torch

        module.zero_grad()
        module.train()
        (module(torch.from_numpy(x)) * torch.from_numpy(g)).sum().backward()
        return module.lora_gains.grad.numpy()
    import mlx.core as mx
    import mlx.nn as nn

    module.train()
    _, found = nn.value_and_grad(module, lambda x: (module(x) * mx.array(g)).sum())(mx.array(x))
    return np.array(found["lora_gains"])


@known_engines
def test_files_of_an_adapter_hold_its_gains(name, tmp_path):
    engine, model = trained(name, "affine")
    for layout in ("peft", "mlx-lm"):
        adapters.save(model, tmp_path / layout, layout=layout)
        opened = adapters.load(bases(name, "affine")[1], tmp_path / layout)
        merged = held(engine, qkit.merge(opened))
        for layer in engine.layers(model):
            if layer.adapter:
                assert_same(merged[layer.path], by_law(engine, layer))


@known_engines
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (None, r"qkit_gains\.safetensors lacks the gains of model\.layers"),
        (lambda gains: gains[1:], r"qkit_gains\.safetensors: model\.layers\S+: an adapter's gains are"),
        (lambda gains: gains[..., 0], r"qkit_gains\.safetensors: model\.layers\S+: an adapter's gains are"),
        (
            lambda gains: gains[..., :1],
            r"is for another base: model\.layers\S+ has gains of .*, 1\], and its scales take",
        ),
        (lambda gains: gains * np.float32("nan"), r"qkit_gains\.safetensors: model\.layers\S+: an adapter holds a NaN"),
        (b"no safetensors", r"qkit_gains\.safetensors"),
    ],
)
def test_a_folder_without_the_gains_that_it_was_saved_with_is_refused(name, damage, says, tmp_path):
    _, model = trained(name, "affine", parts=())
    adapters.save(model, tmp_path)
    file = tmp_path / "qkit_gains.safetensors"
    held = load_file(file)
    file.unlink()
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif damage:
        save_file({path: np.ascontiguousarray(damage(one)) for path, one in held.items()}, file)
    with pytest.raises(qkit.ArtifactError, match=says):
        adapters.load(bases(name, "affine")[1], tmp_path)


@known_engines
def test_an_adapter_without_gains_in_the_place_of_one_with_gains_has_none(name, tmp_path):
    _, model = trained(name, "affine")
    adapters.save(model, tmp_path)
    engine, base = bases(name, "affine")
    adapters.save(qkit.adapt(base, Adapter(rank=4, scales="stored")), tmp_path)
    opened = adapters.load(bases(name, "affine")[1], tmp_path)
    assert all(engine.adapter_update(one.module).gains is None for one in engine.layers(opened) if one.adapter)


@known_engines
def test_gains_for_a_base_that_cannot_have_them_are_refused(name, tmp_path):
    _, model = trained(name, "")
    adapters.save(model, tmp_path)
    with pytest.raises(qkit.ArtifactError, match="cannot learn them: it has no codes yet"):
        adapters.load(qkit.prepare(build(name), "int4-g64"), tmp_path)


@known_engines
def test_scales_train_where_they_are_those_of_a_file_or_where_they_are_asked_to(name):
    for base, scales, learns in (
        ("", None, False),
        ("", "learned", True),
        ("affine", None, True),
        ("affine", "stored", False),
    ):
        engine, model = bases(name, base)
        model = qkit.adapt(model, Adapter(rank=2, scales=scales))
        found = {
            engine.adapter_update(layer.module).gains is not None for layer in engine.layers(model) if layer.adapter
        }
        assert found == {learns}, (base, scales)


@known_engines
@pytest.mark.parametrize(
    ("recipe", "stage", "says"),
    [
        ("mxfp4-a16", "converted", "a row has no floats for scales"),
        ("nvfp4-a16", "converted", "a row has no floats for scales"),
        ("int8-dynamic-act-int4-weight", "converted", "its inputs are on"),
        ("int4-g64", "prepared", 'use a recipe with scales = "learned"'),
    ],
)
def test_layers_whose_scales_cannot_train_are_refused_by_name(name, recipe, stage, says):
    model = qkit.convert(build(name), recipe) if stage == "converted" else qkit.prepare(build(name), recipe)
    with pytest.raises(qkit.StageError, match=rf"model\.layers\.0\.\S+ cannot learn its scales: .*{says}"):
        qkit.adapt(model, Adapter(rank=2, scales="learned"))


def test_a_wish_that_makes_no_sense_is_refused():
    with pytest.raises(qkit.QkitError, match="adapter scales is 'mlx': choose one of learned, stored"):
        Adapter(scales="mlx")
    q = read_tensor(qkit.Grid("int4", 64, "affine"), "float32")
    with pytest.raises(qkit.QkitError, match=r"gains are \(7, 1, 1\) and its B \(6, 2\): want \[outputs, groups"):
        adapters.Update(
            np.zeros((2, 128), np.float32),
            np.zeros((6, 2), np.float32),
            1.0,
            gains=np.zeros((len(q.codes) + 1, 1, 1), np.float32),
        )


@pytest.mark.skipif("torchao" not in KNOWN, reason="needs torch")
@pytest.mark.parametrize("base", ["", "affine"])
@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_compiled_code_has_the_outputs_and_gradients_of_eager_code(base, mode, ste):
    import torch

    _, model = trained("torchao", base, parts=(mode,))
    layer = next(layer for layer in qkit.backend("torchao").layers(model) if layer.adapter)
    module, x = (
        layer.module.train(),
        torch.from_numpy(TOKENS[:, :1].astype(np.float32) @ np.ones((1, layer.shape[1]), np.float32)),
    )
    module.rule = replace(module.rule, ste=ste)

    def outcome(function):
        module.zero_grad()
        y = function(x)
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        return [y.detach(), *(one.grad.clone() for one in module.adapter_parameters())]

    eager, compiled = outcome(module), outcome(torch.compile(module, backend="aot_eager"))
    assert len(eager) == 4
    for some, others in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(some, others, rtol=0, atol=1e-5 * some.abs().max())  # sums in another order


@pytest.mark.skipif("torchao" not in KNOWN, reason="needs torch")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5
def test_peft_and_mlx_lm_open_such_an_adapter_without_its_gains(tmp_path):
    peft = pytest.importorskip("peft")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    _, model = trained("torchao", "affine")
    for layout in ("peft", "mlx-lm"):
        adapters.save(model, tmp_path / layout, layout=layout)
    peft.PeftModel.from_pretrained(build("torchao"), tmp_path / "peft")
    tuner.load_adapters(build("mlx"), str(tmp_path / "mlx-lm"))
