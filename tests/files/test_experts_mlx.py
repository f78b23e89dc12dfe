"""Mixtures of experts on MLX and in mlx-lm's files: the bytes of the other engines, opened equal, and back."""

import json

import numpy as np
import pytest
from alike import contents, equal
from models import make
from safetensors.numpy import save_file

import qkit
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.storage.arrays import read_file
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

utils = pytest.importorskip("mlx_lm.utils")
pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

BE = qkit.backend("mlx")
TOKENS = np.random.default_rng(5).integers(0, 256, (2, 40)).astype(np.int32)
BARS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
SPLIT = "kv_b_proj"
ROUNDING = 3e-6  #: of the largest logit; engines sum float32 products in different orders


def quantized(folder, family, recipe="int4-g32"):
    """A checkpoint of transformers, and the artifact of `qkit quantize`."""
    source = make(folder / "float", family)
    plan = make_plan(source, qkit.recipe(recipe))
    quantize_directory(plan, folder / "qkit", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    return source, folder / "qkit"


def off(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("recipe", ["int4-g32", "mxfp4-a16", "nvfp4-a16"])
@pytest.mark.parametrize("family", BARS)
def test_prepared_converted_saved_and_reloaded_are_one_model_with_the_files_of_quantize(family, recipe, tmp_path):
    source, files = quantized(tmp_path, family, recipe)
    model = qkit.prepare(qkit.load(source, backend="mlx"), recipe)
    prepared = BE.logits(model, TOKENS)
    model = qkit.convert(model)
    assert equal(BE.logits(model, TOKENS), prepared)
    qkit.save(model, tmp_path / "saved", source=source)
    assert equal(BE.logits(qkit.load(tmp_path / "saved", backend="mlx"), TOKENS), prepared)
    assert equal(BE.logits(qkit.load(files, backend="mlx"), TOKENS), prepared)
    mine, theirs = (read_file(folder / "model.safetensors")[0] for folder in (tmp_path / "saved", files))
    assert mine.keys() == theirs.keys()
    assert all(equal(mine[name], theirs[name]) for name in mine)
    on_torch = qkit.load(tmp_path / "saved", backend="torchao")
    assert off(prepared, qkit.backend("torchao").logits(on_torch, TOKENS)) <= ROUNDING


@pytest.mark.parametrize("family", BARS)
def test_float_experts_are_saved_as_transformers_reads_them(family, tmp_path):
    source = make(tmp_path / "float", family)
    qkit.save(qkit.load(source, backend="mlx"), tmp_path / "saved", source=source)
    mine, theirs = (read_file(folder / "model.safetensors")[0] for folder in (tmp_path / "saved", source))
    assert mine.keys() == theirs.keys()
    assert all(equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", [*BARS, "lfm2_moe", "qwen2_moe"])
def test_mlx_lm_opens_an_export_with_the_logits_of_the_artifact_and_it_comes_back(family, tmp_path):
    _, files = quantized(tmp_path, family)
    source = read_model(files)
    as_values = export_mlx(source, tmp_path / "mlx")
    model, _ = utils.load_model(tmp_path / "mlx")
    found = np.array(model(mx.array(TOKENS)).astype(mx.float32))
    assert off(found, BE.logits(qkit.load(files, backend="mlx"), TOKENS)) <= ROUNDING
    kinds = {type(module).__name__ for _, module in model.named_modules()}
    assert "QuantizedSwitchLinear" in kinds
    assert "SwitchLinear" not in kinds
    assert all(path.endswith(SPLIT) for path in as_values)
    assert bool(as_values) == (family == "deepseek_v3")
    before, after = source.digests(), read_model(tmp_path / "mlx").digests()
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {f"{path}.weight" for path in as_values}
    to_artifact(read_model(tmp_path / "mlx"), tmp_path / "back")
    if not as_values:
        assert contents(tmp_path / "back")["model.safetensors"] == contents(files)["model.safetensors"]


def test_values_of_kv_b_proj_are_those_of_its_codes(tmp_path):
    _, files = quantized(tmp_path, "deepseek_v3")
    source = read_model(files)
    as_values = export_mlx(source, tmp_path / "mlx")
    stored, _ = read_file(tmp_path / "mlx/model.safetensors")
    from qkit.formats.packed import unpack

    for path in as_values:
        assert equal(stored[f"{path}.weight"], qkit.dequantize(unpack(source.weights[path].read())))
        assert f"{path}.scales" not in stored
        assert path not in json.loads((tmp_path / "mlx/config.json").read_text())["quantization"]


@pytest.mark.parametrize("family", BARS)
def test_experts_that_a_recipe_leaves_float_are_stacked_too(family, tmp_path):
    source = make(tmp_path / "float", family)
    rule = qkit.Rule(("*",), weight=qkit.Grid("int4", 32))
    plan = make_plan(source, qkit.Recipe("linear", (qkit.Rule(("lm_head",)), rule)))
    quantize_directory(plan, tmp_path / "qkit", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    held = read_model(tmp_path / "qkit")
    export_mlx(held, tmp_path / "mlx")
    model, _ = utils.load_model(tmp_path / "mlx")
    found = np.array(model(mx.array(TOKENS)).astype(mx.float32))
    assert off(found, BE.logits(qkit.load(tmp_path / "qkit", backend="mlx"), TOKENS)) <= ROUNDING
    before, after = held.digests(), read_model(tmp_path / "mlx").digests()
    assert {name for name in before if before[name] != after.get(name)} <= {n for n in before if SPLIT in n}
    assert before.keys() == after.keys()


def test_a_stack_that_lacks_an_expert_or_has_two_grids_is_refused_by_name(tmp_path):
    from dataclasses import replace

    _, files = quantized(tmp_path, "qwen3_moe")
    source = read_model(files)
    place = "model.layers.0.mlp.experts"
    without = {path: weight for path, weight in source.weights.items() if path != f"{place}.1.up_proj"}
    with pytest.raises(qkit.ArtifactError, match=r"switch_mlp\.up_proj: expert 1 is missing"):
        export_mlx(replace(source, weights=without), tmp_path / "mlx")
    other = source.weights[f"{place}.1.up_proj"]
    rule = replace(other.rule, weight=qkit.Grid("int4", 64))
    mixed = {**source.weights, f"{place}.1.up_proj": replace(other, rule=rule)}
    with pytest.raises(qkit.ArtifactError, match=r"switch_mlp\.up_proj: the experts are on several grids"):
        export_mlx(replace(source, weights=mixed), tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_a_mixture_that_mlx_lm_quantized_comes_in_and_a_quantized_router_as_its_values(tmp_path):
    source = make(tmp_path / "float", "qwen3_moe")
    held = read_model(source)
    export_mlx(held, tmp_path / "plain")
    for name, quantizes in (("theirs", lambda path, _: not path.endswith(".gate")), ("router", lambda *_: True)):
        model, config = utils.load_model(tmp_path / "plain")
        nn.quantize(
            model, 32, 4, mode="mxfp4", class_predicate=lambda p, m, q=quantizes: hasattr(m, "to_quantized") and q(p, m)
        )
        folder = tmp_path / name
        folder.mkdir()
        arrays = {key: np.array(value) for key, value in dict(nn.utils.tree_flatten(model.parameters())).items()}
        save_file(arrays, folder / "model.safetensors")
        config = {**config, "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": config["quantization"]}))
    routed = read_model(tmp_path / "router")
    gate = "model.layers.0.mlp.gate"
    assert gate not in routed.weights
    assert any("routers" in note for note in routed.notes)
    stored = read_file(tmp_path / "router" / "model.safetensors")[0]
    parts = [mx.array(np.asarray(stored[f"{gate}.{name}"])) for name in ("weight", "scales")]
    values = np.array(mx.dequantize(*parts, group_size=32, bits=4, mode="mxfp4").astype(mx.float32))
    assert (routed.tensors[f"{gate}.weight"].astype(np.float32) == values).all()
    theirs = read_model(tmp_path / "theirs")
    to_artifact(theirs, tmp_path / "artifact")
    model, _ = utils.load_model(tmp_path / "theirs")
    wanted = np.array(model(mx.array(TOKENS)).astype(mx.float32))
    for name in ("mlx", "torchao"):
        found = qkit.backend(name).logits(qkit.load(tmp_path / "artifact", backend=name), TOKENS)
        assert off(found, wanted) <= ROUNDING
