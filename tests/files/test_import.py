"""Other tools' quantized models: taken as they are, code by code, or refused with the reason."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import quantized
from models import make, weight
from safetensors.numpy import save_file
from tables import FILE_GRIDS as GRIDS

import qkit
from qkit.exchange import diff
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.exchange.write_model import weights_only
from qkit.formats import mlx_lm
from qkit.formats.packed import pack, unpack
from qkit.grid import Grid
from qkit.storage.arrays import read_file
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "llm-compressor"  # made by golden/llm_compressor.py
RECIPES = ["int4-g64", "int4-g64-minmax", "int8-row", "int3-g32", "mxfp4-a16", "mxfp8-a16", "fp8"]


def written_by_qkit(folder, recipe):
    """The golden float model, quantized by `qkit quantize`."""
    plan = make_plan(GOLDEN / "float", qkit.recipe(recipe))
    quantize_directory(plan, folder, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    return read_model(folder)


# there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_artifact_goes_to_mlx_and_back_byte_by_byte(recipe, dtype, tmp_path):
    folder = quantized(tmp_path, recipe, dtype=dtype)
    export_mlx(read_model(folder), tmp_path / "mlx")
    to_artifact(read_model(tmp_path / "mlx"), tmp_path / "back")
    assert read_model(tmp_path / "mlx").digest() == read_model(folder).digest()
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "lfm2_moe"])
def test_so_does_every_family(family, tmp_path):
    folder = quantized(tmp_path, "int4-g32", family=family)
    config = json.loads((folder / "config.json").read_text())
    if "head_dim" in config and config["head_dim"] is None:  # mlx-lm reads a number, which stays
        heads = config["hidden_size"] // config["num_attention_heads"]
        (folder / "config.json").write_text(json.dumps({**config, "head_dim": heads}, indent=2, sort_keys=True) + "\n")
    export_mlx(read_model(folder), tmp_path / "mlx", shard_bytes=200_000)
    to_artifact(read_model(tmp_path / "mlx"), tmp_path / "back")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("recipe", [*RECIPES, "nvfp4-a16"])
def test_compressed_tensors_without_a_word_of_qkit_come_back_with_an_equal_digest(recipe, tmp_path):
    """What is left when another program has read and rewritten an artifact: no metadata, another tool's configuration."""
    folder = quantized(tmp_path, recipe, dtype="bfloat16")
    tensors, _ = read_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "theirs")
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "theirs" / "qkit.json").unlink()
    theirs = read_model(tmp_path / "theirs")
    assert theirs.foreign
    to_artifact(theirs, tmp_path / "back")
    assert read_model(tmp_path / "back").digest() == read_model(folder).digest()


# llm-compressor


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16"])
def test_llm_compressor_s_codes_are_untouched(scheme, tmp_path):
    to_artifact(read_model(GOLDEN / scheme), tmp_path / "out")
    theirs, _ = read_file(GOLDEN / scheme / "model.safetensors")
    ours, _ = read_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # that is how one asks for the decoded weights
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16"])
def test_an_imported_model_computes_what_transformers_does(scheme, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    told = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(GOLDEN / scheme, dtype="auto", quantization_config=told)
    to_artifact(read_model(GOLDEN / scheme), tmp_path / "out")
    ours = qkit.load(tmp_path / "out", backend="torchao")
    tokens = np.arange(18).reshape(2, 9)
    engine = qkit.backend("torchao")
    assert np.array_equal(engine.logits(ours, tokens), engine.logits(theirs, tokens))


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16"])
def test_llm_compressor_s_model_goes_straight_to_mlx(scheme, tmp_path):
    theirs = read_model(GOLDEN / scheme)
    export_mlx(theirs, tmp_path / "mlx")
    assert read_model(tmp_path / "mlx").digest() == theirs.digest()


@pytest.mark.parametrize("name", ["torchao", "mlx"])
def test_an_imported_model_loads(name, tmp_path):
    if not any(status.name == name and status.ready for status in qkit.backends()):
        pytest.skip(f"{name} is not installed")
    to_artifact(read_model(GOLDEN / "W4A16_ASYM"), tmp_path / "out")
    model = qkit.load(tmp_path / "out", backend=name)
    rows = {row.path: row.weight for row in qkit.coverage(model).rows}
    assert rows["model.layers.0.mlp.up_proj"] == "int4-g128-minmax"
    assert rows["lm_head"] == ""


def test_mxfp4_is_llm_compressor_s_bit_for_bit(tmp_path):
    rows = list(diff.compare(written_by_qkit(tmp_path / "out", "mxfp4-a16-even"), read_model(GOLDEN / "MXFP4A16")))
    assert all(row.equal for row in rows)
    assert sum(row.numbers for row in rows if row.compared == "codes") == 90_112


@pytest.mark.parametrize(
    ("scheme", "recipe", "flipped"), [("W4A16", "int4-g128-midmax", 562), ("W8A16", "int8-g128-midmax", 9176)]
)
def test_scales_are_llm_compressor_s_and_codes_but_for_its_division_in_bfloat16(scheme, recipe, flipped, tmp_path):
    """Its quotient is rounded to bfloat16 before it is rounded to a code: that accounts for every one of 90,112 codes."""
    ours, theirs = written_by_qkit(tmp_path / "out", recipe), read_model(GOLDEN / scheme)
    original, _ = read_file(GOLDEN / "float" / "model.safetensors")
    rows = [row for row in diff.compare(ours, theirs) if row.compared == "codes"]
    assert [row.scales for row in rows] == [0] * 7
    assert sum(row.codes for row in rows) == flipped
    for path, held in theirs.weights.items():
        q = unpack(held.read())
        w, s = original[f"{path}.weight"], q.scales.astype(ml_dtypes.bfloat16)
        quotient = w.reshape(*s.shape, -1) / s[..., None]
        assert quotient.dtype == ml_dtypes.bfloat16
        element = q.grid.element
        codes = np.clip(np.rint(quotient.astype(np.float32)), element.lowest, element.highest)
        assert np.array_equal(codes.reshape(q.shape), q.codes)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W8A8", r"down_proj quantizes its inputs or outputs too, which would be lost: --weights-only"),
        ("FP8_DYNAMIC", r"down_proj quantizes its inputs or outputs too.*--weights-only"),
    ],
)
def test_what_qkit_has_no_grid_for_is_refused(scheme, message, tmp_path):
    with pytest.raises(qkit.ArtifactError, match=message):
        to_artifact(read_model(GOLDEN / scheme), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "grid"), [("NVFP4A16", "e2m1-g16-stored-nvfp4-inverse"), ("FP8_DYNAMIC", "e4m3-row-stored")]
)
def test_scales_of_no_rule_of_qkit_s_are_on_read_grids(scheme, grid, tmp_path):
    theirs = weights_only(read_model(GOLDEN / scheme))
    to_artifact(theirs, tmp_path / "out")
    assert {str(weight.rule.weight) for weight in theirs.weights.values()} == {grid}
    assert read_model(tmp_path / "out").digest() == theirs.digest()


def edited(tmp_path, edit):
    """The golden W4A16 with its `quantization_config` changed."""
    shutil.copytree(GOLDEN / "W4A16", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("config_groups"), "the quantization_config is not readable"),
        (
            lambda c: c["config_groups"]["group_0"].update(targets=[]),
            "no group of the quantization_config applies to it",
        ),
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:("]), "is not readable"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"), "weight_g_idx is missing"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), 'strategy "block"'),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=7), "7 bits of int, symmetric True"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=64), "weight_scale is bfloat16"),
        (lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "does not read 'marlin-24'"),
        (lambda c: c.update(quant_method="gptq"), "quantized by gptq"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(edit, message, tmp_path):
    folder = edited(tmp_path, edit)
    with pytest.raises(qkit.ArtifactError, match=message):
        to_artifact(read_model(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["quantization", "quantization_config"])
@pytest.mark.parametrize("value", ["4bit", [4], 4, {"bits": "four"}, {"bits": 4, "group_size": {}}])
def test_nonsense_in_a_configuration_is_bad_input(name, value, tmp_path):
    shutil.copytree(GOLDEN / "W4A16", tmp_path / "theirs")
    tensors, _ = read_file(GOLDEN / "W4A16" / "model.safetensors")
    words = np.ascontiguousarray(tensors["model.layers.0.mlp.up_proj.weight_packed"]).view(np.uint32)
    extra = {"x.weight": words, "x.scales": np.ones((128, 4), np.float32), "x.biases": np.ones((128, 4), np.float32)}
    save_file({**tensors, **extra}, tmp_path / "theirs" / "model.safetensors")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", name: value}))
    with pytest.raises(
        qkit.ArtifactError,
        match=r"want an object|quantized by mlx, and model.* by compressed-tensors|by an unknown tool",
    ):
        to_artifact(read_model(tmp_path / "theirs"), tmp_path / "out")


def test_groups_are_found_by_name_by_pattern_and_by_class(tmp_path):
    def split(config):
        group = config["config_groups"]["group_0"]
        wrong = {**group, "weights": {**group["weights"], "num_bits": 8}}
        config["config_groups"] = {
            "wrong": {**wrong, "targets": ["Linear"]},
            "by_name": {**group, "targets": ["mlp.up_proj", "model.layers.0.mlp.gate_proj"]},
            "by_pattern": {**group, "targets": [r"re:.*(down|self_attn\.[qkvo])_proj"]},
        }

    assert read_model(edited(tmp_path, split)).digest() == read_model(GOLDEN / "W4A16").digest()


# mlx-lm


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("float") / "model", "llama", dtype="bfloat16")


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_mlx_lm_s_codes_are_untouched(mode, bits, group, float_model, tmp_path):
    mx, convert = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm").convert
    convert(str(float_model), str(tmp_path / "mlx"), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode)
    theirs = read_model(tmp_path / "mlx")
    to_artifact(theirs, tmp_path / "out")
    assert read_model(tmp_path / "out").digest() == theirs.digest()
    stored, _ = read_file(tmp_path / "mlx" / "model.safetensors")
    assert len(theirs.weights) == 16
    for path, held in theirs.weights.items():
        packed = held.read()
        assert packed.words.tobytes() == stored[f"{path}.weight"].tobytes()
        assert packed.scales.tobytes() == stored[f"{path}.scales"].tobytes()
        words, scales = (mx.array(stored[f"{path}.{name}"]) for name in ("weight", "scales"))
        values = mx.dequantize(words, scales, group_size=group, bits=bits, mode=mode, dtype=mx.bfloat16)
        wanted = np.array(values.view(mx.uint16)).view(ml_dtypes.bfloat16)
        assert np.array_equal(qkit.dequantize(unpack(packed)), wanted)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.group != "tensor"], ids=str)
def test_grids_are_found_in_mlx_s_tensors_as_far_as_decoding_goes(grid):
    packed = pack(qkit.quantize(weight(), grid))
    container = mlx_lm.layout(grid, 256)
    found = mlx_lm.grid_of(mlx_lm.store(packed), container, dtype="float32")
    again = mlx_lm.restore(mlx_lm.store(packed), grid=found, dtype="float32", shape=(24, 256))
    assert (found.element, found.symmetric) == (grid.element, grid.symmetric)
    assert np.array_equal(qkit.dequantize(unpack(again)), qkit.dequantize(unpack(packed)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["biases"].__setitem__((3, 1), 0.1), "biases holds 1 numbers, each of which should be -8 scales"),
        (lambda t: t["scales"].__setitem__((3, 1), np.nan), "scales holds 1 numbers"),
        (lambda t: t.pop("biases"), "biases is missing"),
        (lambda t: t.update(weight=t["weight"][:, :5]), r"weight is uint32 \[24, 5\]"),
    ],
)
def test_damage_in_mlx_s_tensors_is_named(damage, message):
    grid = Grid("int4", 64)
    tensors = {name: np.array(array) for name, array in mlx_lm.store(pack(qkit.quantize(weight(), grid))).items()}
    damage(tensors)
    with pytest.raises(qkit.ArtifactError, match=message):
        mlx_lm.restore(tensors, grid=grid, dtype="float32", shape=(24, 256))


def test_repeated_scales_have_to_repeat():
    grid = Grid("int8", "row")
    tensors = {name: np.array(array) for name, array in mlx_lm.store(pack(qkit.quantize(weight(), grid))).items()}
    tensors["scales"][5, 1] *= 2
    with pytest.raises(
        qkit.ArtifactError, match="scales holds 1 numbers, each of which should be that of its row or group"
    ):
        mlx_lm.restore(tensors, grid=grid, dtype="float32", shape=(24, 256))


def test_names_that_mlx_lm_changes_are_refused(float_model, tmp_path):
    pytest.importorskip("mlx_lm").convert(str(float_model), str(tmp_path / "mlx"), quantize=True, q_mode="mxfp4")
    file = tmp_path / "mlx" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gpt_neox"'))
    with pytest.raises(qkit.ArtifactError, match="how mlx-lm renames the tensors of a 'gpt_neox' is not known"):
        read_model(tmp_path / "mlx")


def test_an_export_says_so_where_an_artifact_is_wanted(tmp_path):
    export_mlx(read_model(quantized(tmp_path, "int4-g64")), tmp_path / "mlx")
    with pytest.raises(qkit.ArtifactError, match="is an export for mlx: qkit import makes an artifact of it"):
        qkit.load(tmp_path / "mlx", backend="torchao")
