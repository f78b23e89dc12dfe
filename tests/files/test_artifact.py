"""An artifact holds the trained model: on the engine that saved it, on the other, and in readers that do not know qkit."""

import json
from itertools import permutations

import numpy as np
import pytest
from models import build, logits
from safetensors.numpy import save_file
from tables import BUILDERS as ENGINES

import qkit
from qkit.storage.arrays import read_file

RECIPES = ["int4-g64", "int4-g64-minmax", "int8-row", "int3-g32", "mxfp4-a16", "mxfp8-a16", "nvfp4-a16", "fp8"]

pytestmark = pytest.mark.skipif(not ENGINES, reason="no engine with modules is installed")


def codes(name, model):
    """Every code and scale of `model`, as bytes by path and part."""
    engine = qkit.backend(name)
    converted = [layer for layer in engine.layers(model) if layer.stage == "converted"]
    return {
        (layer.path, part): engine.to_numpy(array).tobytes()
        for layer in converted
        for part, array in engine.unpack(layer.module).parts().items()
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_reloaded_model_is_the_same_model(name, recipe, tied, tmp_path):
    model = qkit.convert(build(name, tie_word_embeddings=tied), recipe)
    again = qkit.load(qkit.save(model, tmp_path / "out"), backend=name)
    assert codes(name, again) == codes(name, model)
    assert np.array_equal(logits(name, again), logits(name, model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("name", "other"), list(permutations(ENGINES, 2)))
def test_the_other_engine_opens_it_with_equal_codes(name, other, recipe, dtype, tmp_path):
    model = qkit.convert(build(name, dtype=dtype), recipe)
    opened = qkit.load(qkit.save(model, tmp_path / "out"), backend=other)
    assert codes(other, opened) == codes(name, model)
    if dtype == "float32":  # MLX on a CPU accumulates bfloat16 in bfloat16: only fp32 logits are comparable
        ours, theirs = logits(name, model), logits(other, opened)
        assert (
            np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()
        )  # two libraries order a matrix product otherwise


@pytest.mark.parametrize("recipe", RECIPES)
def test_engines_write_the_same_bytes(recipe, tmp_path):
    folders = [qkit.save(qkit.convert(build(name), recipe), tmp_path / name) for name in ENGINES]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("name", ENGINES)
def test_two_writes_are_the_same_bytes(name, tmp_path):
    model = qkit.convert(build(name), "int4-g64")
    first, second = (qkit.save(model, tmp_path / folder) for folder in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # that is how one asks for the decoded weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_opens_it_with_the_same_logits(recipe, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = qkit.convert(build("torchao", dtype=dtype), recipe)
    folder = qkit.save(model, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert np.array_equal(logits("torchao", opened), logits("torchao", model))


@pytest.mark.parametrize("recipe", ["int4-g64", "int8-row", "int3-g32", "fp8"])
def test_transformers_opens_it_without_being_told_how(recipe, tmp_path):
    """Not `minmax`, whose zero points compressed-tensors 0.20 shapes wrongly before it reads them, nor MX in float32."""
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = qkit.convert(build("torchao"), recipe)
    opened = AutoModelForCausalLM.from_pretrained(qkit.save(model, tmp_path / "out"), dtype=torch.float32)
    assert np.array_equal(logits("torchao", opened), logits("torchao", model))


@pytest.mark.parametrize("name", ENGINES)
def test_a_float_model_is_saved_as_a_plain_directory(name, tmp_path):
    model = build(name)
    folder = qkit.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert np.array_equal(logits(name, qkit.load(folder, backend=name)), logits(name, model))


@pytest.mark.parametrize("name", ENGINES)
def test_the_description_is_whole(name, tmp_path):
    folder = qkit.save(qkit.convert(build(name), "mxfp4-a16"), tmp_path / "out")
    _, metadata = read_file(folder / "model.safetensors")
    described = json.loads(metadata["qkit"])
    assert list(metadata) == ["qkit"]
    assert described["numerics"] == 1
    assert described["rules"][0]["weight"] == {"element": "e2m1", "group": 32, "scale": "even"}
    assert "model.layers.{0-1}.mlp.down_proj" in described["rules"][0]["patterns"]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", ENGINES)
def test_files_are_readable_by_others(name, tmp_path):
    folder = qkit.save(qkit.convert(build(name), "int4-g64"), tmp_path / "out")
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("name", ENGINES)
def test_an_artifact_is_replaced_whole_and_nothing_else_is_touched(name, tmp_path):
    out = tmp_path / "out"
    qkit.save(qkit.convert(build(name), "int4-g64"), out)
    qkit.save(qkit.convert(build(name), "int3-g64"), out)
    assert qkit.coverage(qkit.load(out, backend=name)).rows[1].weight == "int3-g64-signed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stranger", ["thesis.tex", "checkpoints/", "README.md"])
@pytest.mark.parametrize("name", ENGINES)
def test_what_save_did_not_write_is_never_removed(name, stranger, tmp_path):
    folder = qkit.save(build(name), tmp_path / "out")
    (folder / stranger).mkdir() if stranger.endswith("/") else (folder / stranger).write_text("x")
    before = sorted(entry.name for entry in folder.iterdir())
    with pytest.raises(qkit.ArtifactError, match="which save did not write"):
        qkit.save(build(name), folder)
    assert sorted(entry.name for entry in folder.iterdir()) == before


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_that_qkit_did_not_write_is_not_replaced(name, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qkit.ArtifactError, match="a model that qkit did not write"):
        qkit.save(build(name), folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(qkit.ArtifactError, match="is where the artifact would go"):
        qkit.save(build(name), folder, source=folder)
    assert read_file(folder / "model.safetensors")[0]["w"].shape == (3,)


def test_companion_files_come_along(tmp_path):
    source = qkit.save(build(ENGINES[0]), tmp_path / "float")
    for file in ("tokenizer.json", "generation_config.json", "modeling_evil.py"):
        (source / file).write_text("{}")
    folder = qkit.save(qkit.convert(build(ENGINES[0]), "int4-g64"), tmp_path / "out", source=source)
    assert {entry.name for entry in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "qkit.json",
    }


def damage_nothing_there(folder):
    (folder / "model.safetensors").unlink()


def damage_truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")


def damage_missing_scale(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))


def damage_missing_norm(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def damage_narrow_words(folder):
    name = "model.layers.0.mlp.up_proj.weight_packed"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:, :5].copy()}))


def damage_nan_scale(folder):
    rewrite(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_scale"].__setitem__((3, 1), np.nan))


def damage_scale_off_the_bfloat16_grid(folder):
    rewrite(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_scale"].__setitem__((3, 1), 1 / 3))


def damage_scale_type(folder):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))


def damage_norm_type(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(128, np.float64)}))


def damage_stray_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update(stray=np.zeros(3, np.float32)))


def damage_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(3, np.float32)}))


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_rules(folder):
    rewrite(folder, lambda tensors: None, {"qkit": '{"numerics": 1, "rules": [{}]}'})


def damage_numerics(folder):
    rewrite(folder, lambda tensors: None, {"qkit": '{"numerics": 99, "rules": []}'})


def rewrite(folder, edit, metadata=None):
    tensors, old = read_file(folder / "model.safetensors")
    tensors = {name: np.array(array) for name, array in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata or old)
    (folder / "qkit.json").unlink()  # the checks besides its digests have to hold, too


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ENGINES)
def test_damage_is_an_error_that_names_the_folder_or_the_tensor(name, damage, tmp_path):
    folder = qkit.save(qkit.convert(build(name), "int4-g64"), tmp_path / "out")
    damage(folder)
    mine = build(name)
    before = codes(name, mine), logits(name, mine)
    for target in (None, mine):
        with pytest.raises(qkit.ArtifactError, match=r"out.*(model|config|stray|metadata|numerics)"):
            qkit.load(folder, backend=name, into=target)
    assert codes(name, mine) == before[0]
    assert np.array_equal(logits(name, mine), before[1])


@pytest.mark.parametrize(
    ("recipe", "tensor", "value"),
    [
        ("mxfp4-a16", "weight_scale", 255),
        ("mxfp8-a16", "weight_scale", 0),
        ("mxfp8-a16", "weight", 0x7F),
        ("nvfp4-a16", "weight_scale", 0x7F),
        ("fp8", "weight_scale", 0x3F),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_numbers_that_are_no_codes_or_scales_are_refused(name, recipe, tensor, value, tmp_path):
    folder = qkit.save(qkit.convert(build(name), recipe), tmp_path / "out")
    full = f"model.layers.0.mlp.up_proj.{tensor}"
    rewrite(folder, lambda tensors: tensors[full].view(np.uint8).__setitem__((0, 1), value))
    with pytest.raises(qkit.ArtifactError, match=f"up_proj: {tensor} holds 1 number"):
        qkit.load(folder, backend=name)


@pytest.mark.parametrize("name", ENGINES)
def test_a_grid_without_portable_layout_is_refused_before_anything_is_written(name, tmp_path):
    recipe = qkit.Recipe("odd", (qkit.Rule(("*.mlp.*",), weight=qkit.Grid("e2m1", 64)),))
    with pytest.raises(qkit.ArtifactError, match="compressed-tensors has no layout for e2m1-g64-rceil"):
        qkit.save(qkit.convert(build(name), recipe), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ENGINES)
def test_another_tools_quantized_directory_is_refused(name, tmp_path):
    folder = qkit.save(build(name), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(qkit.ArtifactError, match="quantized by awq"):
        qkit.load(folder, backend=name)


@pytest.mark.skipif(len(ENGINES) < 2, reason="two engines are needed")
@pytest.mark.parametrize("recipe", ["int8-static-act-int8-weight", "float8-static-act-float8-weight"])
def test_static_scales_travel_between_engines(recipe, tmp_path):
    model = qkit.prepare(build("torchao"), recipe).eval()
    with qkit.calibrating(model):
        logits("torchao", model)
    want = logits("torchao", qkit.convert(model))
    qkit.save(model, tmp_path / "one")
    there = qkit.load(tmp_path / "one", backend="mlx")
    # a number on a rounding edge may take the next code where the engines' sums differ in the last bit
    assert np.abs(logits("mlx", there) - want).max() < 0.02 * np.abs(want).max()
    qkit.save(there, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    scheme = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert (scheme["input_activations"]["strategy"], scheme["input_activations"]["dynamic"]) == ("tensor", False)


@pytest.mark.parametrize("damage", ["missing", "type", "nan", "off the grid"])
def test_a_damaged_static_scale_is_refused(damage, tmp_path):
    pytest.importorskip("torch")
    model = qkit.prepare(build("torchao"), "int8-static-act-int8-weight").eval()
    with qkit.calibrating(model):
        logits("torchao", model)
    qkit.save(qkit.convert(model), tmp_path / "one")
    arrays, metadata = read_file(tmp_path / "one" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.input_scale"
    tensors = {key: np.array(array) for key, array in arrays.items()}
    scale = tensors.pop(name)
    if damage != "missing":
        values = {"type": scale.astype(np.float64), "nan": scale * np.nan, "off the grid": scale * np.float32(1.001)}
        tensors[name] = values[damage]
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata)
    (tmp_path / "one" / "qkit.json").unlink()
    with pytest.raises(qkit.ArtifactError, match="up_proj: input_scale"):
        qkit.load(tmp_path / "one", backend="torchao")


@pytest.mark.skipif(len(ENGINES) < 2, reason="two engines are needed")
@pytest.mark.parametrize("recipe", ["int4-g64-all", "mxfp4-a16-all"])
def test_a_tied_head_is_stored_once_and_opens_everywhere(recipe, tmp_path):
    model = qkit.prepare(build("torchao", tie_word_embeddings=True), recipe)
    prepared = logits("torchao", model)
    want = logits("torchao", qkit.convert(model))
    assert (prepared == want).all()
    qkit.save(model, tmp_path / "one")
    arrays, _ = read_file(tmp_path / "one" / "model.safetensors")
    assert not [name for name in arrays if name.startswith("lm_head")]
    again = qkit.load(tmp_path / "one", backend="torchao")
    assert (logits("torchao", again) == want).all()
    assert qkit.coverage(again).rows[-1].tied == "model.embed_tokens"
    there = qkit.load(tmp_path / "one", backend="mlx")
    assert np.abs(logits("mlx", there) - want).max() < 1e-5 * np.abs(want).max()
    mine = qkit.convert(build("mlx", tie_word_embeddings=True), recipe)
    qkit.save(mine, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
