"""Whatever a configuration says of quantization is carried out or refused by name, by every reader."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import quantized
from models import make
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.artifact.verify import verify
from qkit.cli.application import application
from qkit.evaluation.opening import open_model
from qkit.exchange.import_model import read_model
from qkit.formats import compressed_tensors, settings
from qkit.grid import Grid
from qkit.storage.arrays import read_file
from qkit.streaming.plan import make_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "llm-compressor"
runner = CliRunner()
HADAMARD = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
HARMLESS = {
    "transform_config": [None, {}, {"config_groups": {}}],
    "sparsity_config": [None, {}, {"format": "dense"}, "dense"],
}

#: What changes numbers, by the key that has to be named.
REFUSED = {
    "transform_config": HADAMARD,
    "sparsity_config": {"format": "sparse-24-bitmask"},
    "moe_sparsity_config": {"method": "prune", "num_experts": [3]},
    "quantization_status": "calibration",
    "a_key_of_the_future": 0,
}


def told(folder, edit, *, source=None):
    """A copy of `source`, whose config.json went through `edit`."""
    shutil.copytree(source or GOLDEN / "W4A16", folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))
    return folder


def exit_codes(folder, out):
    """Of the commands that read a model directory, those that end well."""
    commands = {
        "import": ["import", folder, out / "a"],
        "export mlx": ["export", folder, out / "b", "--to", "mlx"],
        "export dense": ["export", folder, out / "c", "--to", "dense"],
        "diff": ["diff", folder, folder],
    }
    return {name: runner.invoke(application, [str(part) for part in line]) for name, line in commands.items()}


@pytest.mark.parametrize("key", REFUSED)
def test_every_reader_refuses_another_tool_s_setting_by_name(key, tmp_path):
    folder = told(tmp_path / "theirs", lambda config: config["quantization_config"].update({key: REFUSED[key]}))
    for name, done in exit_codes(folder, tmp_path).items():
        assert isinstance(done.exception, qkit.ArtifactError), name
        assert f"quantization_config: {key} is " in str(done.exception)
        assert json.dumps(REFUSED[key])[:40] in str(done.exception)
    assert not {"a", "b", "c"} & {entry.name for entry in tmp_path.iterdir()}
    for reader in (inspect_directory, lambda folder: make_plan(folder, qkit.recipe("int4-g64"))):
        with pytest.raises(qkit.ArtifactError, match=f"quantization_config: {key} is "):
            reader(folder)
    if any(status.name == "torchao" and status.ready for status in qkit.backends()):
        with pytest.raises(qkit.ArtifactError, match=key):
            open_model(qkit.backend("torchao"), folder)


@pytest.mark.parametrize("key", REFUSED)
def test_every_reader_refuses_such_a_setting_in_an_artifact_of_qkit_s_own(key, tmp_path):
    own = quantized(tmp_path, "int4-g64")
    folder = told(
        tmp_path / "own", lambda config: config["quantization_config"].update({key: REFUSED[key]}), source=own
    )
    for name, done in exit_codes(folder, tmp_path).items():
        assert isinstance(done.exception, qkit.ArtifactError), name
        assert key in str(done.exception)
    with pytest.raises(qkit.ArtifactError, match=key):
        inspect_directory(folder)
    assert any(key in str(problem) for problem in verify(folder))
    if any(status.name == "torchao" and status.ready for status in qkit.backends()):
        with pytest.raises(qkit.ArtifactError, match=key):
            qkit.load(folder, backend="torchao")


@pytest.mark.parametrize("key", HARMLESS)
def test_settings_that_say_nothing_are_no_obstacle(key, tmp_path):
    for i, value in enumerate(HARMLESS[key]):
        folder = told(tmp_path / str(i), lambda config, value=value: config["quantization_config"].update({key: value}))
        assert read_model(folder).digest() == read_model(GOLDEN / "W4A16").digest()


def group(config):
    return config["quantization_config"]["config_groups"]["group_0"]


ATTENTION = {"targets": ["re:.*self_attn$"], "input_activations": CACHE}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: group(c).update(rotation="R4"), r'config_groups.group_0: rotation is "R4"'),
        (lambda c: group(c)["weights"].update(dynamic=True), r"group_0.weights: dynamic is true"),
        (lambda c: group(c)["weights"].update(block_structure=[128, 128]), r"block_structure \[128, 128\] do not fit"),
        (lambda c: group(c)["weights"].update(clip=0.9), r"group_0.weights: clip is 0.9"),
        (lambda c: group(c)["weights"].update(scale_dtype="torch.float64"), r'scale_dtype is "torch.float64"'),
        (lambda c: group(c)["weights"].update(zp_dtype="torch.float32"), r'zp_dtype is "torch.float32"'),
        (lambda c: group(c)["weights"].update(strategy="channel"), r'strategy "channel", group_size 128'),
        (
            lambda c: group(c)["weights"].update(type="float", symmetric=False),
            r"4 bits of float, symmetric False",
        ),
        (lambda c: group(c)["weights"].update(symmetric="yes"), r"symmetric yes"),
        (lambda c: group(c).update(input_activations={**CACHE, "hadamard": 1}), r"input_activations: hadamard is 1"),
        (lambda c: group(c).update(format="float-quantized"), r"'float-quantized' in its group, and 'pack-quantized'"),
        (lambda c: c["quantization_config"].update(config_groups={"W4A16": ["Linear"]}), r"config_groups.W4A16 is"),
        (lambda c: c["quantization_config"].update(ignore=["re:.*up_proj"]), r"ignores it by 're:\.\*up_proj'"),
        (
            lambda c: c["quantization_config"]["config_groups"].update(attention=ATTENTION),
            r"attention.input_activations",
        ),
        (lambda c: group(c).update(targets=["LlamaAttention"]), r"no group of the quantization_config applies to it"),
        (lambda c: c.update(quantize_activations=True), r"config.json: quantize_activations is true"),
        (lambda c: c.update(transform_config=HADAMARD), r"config.json: transform_config is"),
        (lambda c: c.update(compression_config={"format": "marlin-24"}), r"config.json: compression_config is"),
        (
            lambda c: c.update(text_config={"quantization_config": {"bits": 4}}),
            r"text_config has a quantization_config",
        ),
    ],
)
def test_what_changes_numbers_is_refused_at_every_level(edit, message, tmp_path):
    with pytest.raises(qkit.ArtifactError, match=message):
        read_model(told(tmp_path / "theirs", edit))


@pytest.mark.parametrize("scheme", [CACHE, {}], ids=["fp8", "int8"])
def test_quantized_caches_are_left_out_and_said(scheme, tmp_path):
    folder = told(tmp_path / "theirs", lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))
    found = read_model(folder)
    assert found.digest() == read_model(GOLDEN / "W4A16").digest()
    assert any(f"kv_cache_scheme is {json.dumps(scheme)[:20]}" in note for note in found.notes)
    assert any("kv_cache_scheme" in note for note in make_plan(folder, qkit.recipe("int4-g64")).notes)


def test_a_status_of_2024_changes_no_number(tmp_path):
    folder = told(tmp_path / "theirs", lambda c: c["quantization_config"].update(quantization_status="frozen"))
    assert read_model(folder).digest() == read_model(GOLDEN / "W4A16").digest()


def test_an_order_of_calibration_changes_no_number(tmp_path):
    folder = told(tmp_path / "theirs", lambda c: group(c)["weights"].update(actorder="static"))
    assert read_model(folder).digest() == read_model(GOLDEN / "W4A16").digest()


def test_a_model_whose_settings_lie_in_another_file_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "float", tmp_path / "theirs")
    (tmp_path / "theirs" / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": "FP8"}}')
    with pytest.raises(
        qkit.ArtifactError, match=r"hf_quant_config.json says that the model is quantized by modelopt, and no"
    ):
        read_model(tmp_path / "theirs")


def retold(folder, edit, *, source="W4A16"):
    """A copy of a golden directory, whose tensors went through `edit`."""
    shutil.copytree(GOLDEN / source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_packed is part of a quantized weight"),
        (lambda t: t.update({f"{LAYER}.weight": np.ones((128, 128), np.float32)}), "weight is there too"),
        (lambda t: t.update({f"{LAYER}.weight_zero_point": np.ones((16, 1), np.int32)}), "weight_zero_point is there"),
        (lambda t: t.update({f"{LAYER}.weight_global_scale": np.ones(1, np.float32)}), "weight_global_scale is there"),
    ],
)
def test_a_tensor_that_no_setting_accounts_for_is_refused(edit, message, tmp_path):
    folder = retold(tmp_path / "theirs", edit)
    for command, done in exit_codes(folder, tmp_path / "out").items():
        assert (done.exit_code, message in str(done.exception)) == (1, True), (command, done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("weight_packed", np.ones((128, 16), np.int32)),
        ("weight_scale_inv", np.ones((1, 1), np.float32)),
        ("qweight", np.ones((16, 128), np.int32)),
        ("weight", np.ones((128, 16), np.uint32)),
    ],
)
def test_a_part_of_a_quantized_weight_is_refused_where_the_configuration_says_nothing(name, array, tmp_path):
    folder = retold(tmp_path / "theirs", lambda t: t.update({f"{LAYER}.{name}": array}), source="float")
    for command, done in exit_codes(folder, tmp_path / "out").items():
        refused = f"{LAYER}.{name} is part of a quantized weight" in str(done.exception)
        assert (done.exit_code, refused) == (1, True), (command, done.exception)
    assert not (tmp_path / "out").exists()
    with pytest.raises(qkit.QkitError, match=f"{LAYER}.*weight"):
        make_plan(folder, qkit.recipe("int8-g64"))


def test_settings_without_a_quantized_layer_are_refused(tmp_path):
    config = json.loads((GOLDEN / "W4A16" / "config.json").read_text())["quantization_config"]
    folder = told(tmp_path / "theirs", lambda c: c.update(quantization_config=config), source=GOLDEN / "float")
    with pytest.raises(qkit.ArtifactError, match="no tensor is part of a weight quantized so"):
        read_model(folder)


def test_every_key_of_the_installed_compressed_tensors_has_been_decided():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert quantization.QuantizationConfig.model_fields.keys() <= settings.CONFIG.keys()
    assert quantization.QuantizationScheme.model_fields.keys() == settings.GROUP.keys()
    assert quantization.QuantizationArgs.model_fields.keys() == settings.WEIGHTS.keys()


# mlx-lm


@pytest.fixture(scope="module")
def of_mlx_lm(tmp_path_factory):
    convert = pytest.importorskip("mlx_lm").convert
    root = tmp_path_factory.mktemp("mlx")
    convert(str(make(root / "float", "llama", dtype="bfloat16")), str(root / "out"), quantize=True, q_mode="mxfp4")
    return root / "out"


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"quantize_input": True}, r"quantization: quantize_input is true"),
        ({"rotation": "hadamard"}, r'quantization: rotation is "hadamard"'),
        ({"global_scale": True}, r"quantization: global_scale is true"),
        (
            {UP: {"group_size": 32, "bits": 4, "mode": "mxfp4", "quantize_input": True}},
            r"up_proj: quantize_input is true",
        ),
        ({UP: False}, r"up_proj is false, and yet the layer has scales"),
        ({"model.norm": {"group_size": 32, "bits": 4}}, r"model.norm is .* and yet the layer has no scales"),
    ],
)
def test_mlx_s_settings_are_carried_out_or_refused(edit, message, of_mlx_lm, tmp_path):
    def both(config):
        for key in settings.QUANTIZATION:
            config[key].update(edit)

    with pytest.raises(qkit.ArtifactError, match=message):
        read_model(told(tmp_path / "theirs", both, source=of_mlx_lm))


def test_two_accounts_of_one_model_have_to_agree(of_mlx_lm, tmp_path):
    folder = told(tmp_path / "theirs", lambda c: c["quantization_config"].update(bits=8), source=of_mlx_lm)
    with pytest.raises(qkit.ArtifactError, match="remove one of them"):
        read_model(folder)


def test_a_plan_says_that_mlx_s_codes_are_decoded(of_mlx_lm, tmp_path):
    folder = told(tmp_path / "theirs", lambda c: c.pop("quantization_config"), source=of_mlx_lm)
    assert any("weights are decoded: MLX" in note for note in make_plan(folder, qkit.recipe("int4-g64")).notes)


# the scale of an NVFP4 tensor


def stored_nvfp4():
    grid = Grid("e2m1", 16, "nvfp4")
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    return grid, dict(compressed_tensors.to_tensors(qkit.quantize(w, grid)))


@pytest.mark.parametrize(
    "value",
    [np.inf, -np.inf, np.nan, 0.0, -0.0, -1.0, 2.0**-126, 2.0**-117, 2.0**96, 2.0**127, 3.0, 1.0000001, 2.0**-149],
)
def test_the_scale_of_an_nvfp4_tensor_is_a_power_of_two_that_r9_can_give(value):
    grid, tensors = stored_nvfp4()
    tensors["weight_global_scale"] = np.array([value], np.float32)
    with pytest.raises(
        qkit.ArtifactError, match=r"weight_global_scale is .*: want a power of two from 2\^-116 to 2\^95"
    ):
        compressed_tensors.from_tensors(tensors, grid=grid, dtype="float32", shape=(8, 64))


@pytest.mark.parametrize("peak", [np.nextafter(np.float32(2.0**127), np.float32(0)), np.float32(1e-38), np.float32(0)])
def test_the_scales_that_r9_gives_at_both_ends_are_read_back(peak):
    grid, _ = stored_nvfp4()
    q = qkit.quantize(np.full((1, 16), peak, np.float32), grid)
    back = compressed_tensors.from_tensors(compressed_tensors.to_tensors(q), grid=grid, dtype="float32", shape=(1, 16))
    assert back.tensor_scale == q.tensor_scale
    assert np.isfinite(qkit.dequantize(back)).all()


def test_a_damaged_nvfp4_scale_is_refused_on_every_way_in(tmp_path):
    own = quantized(tmp_path, "nvfp4-a16")
    tensors, metadata = read_file(own / "model.safetensors")
    tensors = {name: np.array(array) for name, array in tensors.items()}
    tensors[f"{UP}.weight_global_scale"][:] = np.inf
    from safetensors.numpy import save_file

    for said in (metadata, {"format": "pt"}):
        folder = tmp_path / ("theirs" if "format" in said else "own")
        shutil.copytree(own, folder, ignore=shutil.ignore_patterns("qkit.json"))
        save_file(tensors, folder / "model.safetensors", metadata=said)
        (tmp_path / "out").mkdir(exist_ok=True)
        for name, done in exit_codes(folder, tmp_path / "out").items():
            if name == "export mlx":  # refuses any nvfp4 whose scale does not go into its blocks
                continue
            assert isinstance(done.exception, qkit.ArtifactError), name
            assert "weight_global_scale is inf" in str(done.exception), name
