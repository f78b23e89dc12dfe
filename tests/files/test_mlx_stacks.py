"""Stacks in models of mlx-lm's `convert -q`: the heads of DeepSeek's `kv_b_proj`, and experts, decoded as they stream."""

import json

import numpy as np
import pytest
from models import make
from safetensors.numpy import save_file
from typer.testing import CliRunner

import qkit
from qkit.cli.application import application
from qkit.exchange.diff import compare
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.storage.arrays import read_folder
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
NOPE = 32  #: rows of keys of a head
PATHS = [f"model.layers.{layer}.self_attn." for layer in range(2)]
#: Arguments of `mlx_lm.convert`. Groups of 64 do not divide the 32 columns of `embed_q`, which stays float.
MODES = {
    "both stacks": {"q_group_size": 32},
    "one stack": {"q_group_size": 64},
    "mixed bits": {"quant_predicate": "mixed_3_6", "q_group_size": 32},
    "mxfp4": {"q_mode": "mxfp4", "q_bits": None, "q_group_size": None},
}


def converted(tmp_path, mode, dtype="float32", family="deepseek_v3"):
    options = MODES[mode] if isinstance(mode, str) else mode
    folder = make(tmp_path / "float", family, dtype=dtype)
    export_mlx(
        read_model(folder), tmp_path / "plain"
    )  # mlx-lm does not open the configurations that transformers 5 writes
    mlx_lm.convert(str(tmp_path / "plain"), str(tmp_path / "mlx"), quantize=True, dtype=dtype, **options)
    return tmp_path / "mlx"


def half(module):
    """The values of a stack of heads by MLX's own decoder, float32."""
    if "scales" not in module:
        return np.array(module.weight)
    biases = module.get("biases")
    kind = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return np.array(mx.dequantize(module.weight, module.scales, biases, **kind).astype(mx.float32))


@pytest.mark.parametrize("mode", MODES)
def test_the_weight_has_the_values_of_both_stacks_and_the_model_the_logits_of_mlx_lm(mode, tmp_path):
    theirs = converted(tmp_path, mode)
    source = read_model(theirs)
    model, _ = mlx_lm.load(str(theirs))
    for number, path in enumerate(PATHS):
        attention = model.layers[number].self_attn
        keys, values = half(attention.embed_q), half(attention.unembed_out)
        want = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, keys.shape[1])
        found = source.tensors[f"{path}kv_b_proj.weight"]
        assert np.array_equal(np.asarray(found), want)
        assert np.array_equal(found[NOPE - 5 : 3 * NOPE], want[NOPE - 5 : 3 * NOPE])  # rows of several heads
    assert any("2 weights that mlx-lm stores as two stacks of heads" in note for note in source.notes)
    to_artifact(source, tmp_path / "artifact")
    wanted = np.array(model(mx.array(TOKENS)).astype(mx.float32))
    for engine in ("torchao", "mlx"):
        opened = qkit.load(tmp_path / "artifact", backend=engine)
        assert np.abs(qkit.backend(engine).logits(opened, TOKENS) - wanted).max() <= 3e-6 * np.abs(wanted).max()


def test_codes_of_the_other_layers_stay_and_a_model_in_bfloat16_opens_in_mlx_lm_again(tmp_path):
    theirs = converted(tmp_path, "both stacks", "bfloat16")
    to_artifact(read_model(theirs), tmp_path / "artifact")
    export_mlx(read_model(tmp_path / "artifact"), tmp_path / "back")
    before, after = (dict(read_folder(folder)[0]) for folder in (theirs, tmp_path / "back"))
    stacks = {name for name in before if "embed_q." in name or "unembed_out." in name}
    assert len(stacks) == 12
    assert before.keys() - after.keys() == stacks
    assert after.keys() - before.keys() == {f"{path}kv_b_proj.weight" for path in PATHS}
    assert all(before[name].tobytes() == after[name].tobytes() for name in before.keys() - stacks)
    made = [
        np.array(mlx_lm.load(str(one))[0](mx.array(TOKENS)).astype(mx.float32)) for one in (theirs, tmp_path / "back")
    ]
    assert np.abs(made[0] - made[1]).max() <= 5e-2 * np.abs(made[0]).max()  # bfloat16 products


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("mode", ["both stacks", "one stack"])
def test_quantizing_while_decoding_equals_quantizing_the_decoded_model(family, mode, tmp_path):
    theirs = converted(tmp_path, mode, "bfloat16", family)
    export_dense(read_model(theirs), tmp_path / "dense")
    for name, folder in (("streamed", theirs), ("from dense", tmp_path / "dense")):
        plan = make_plan(folder, qkit.recipe("int4-g32"))
        engine = qkit.backend("numpy")
        quantize_directory(plan, tmp_path / name, engine=engine, workers=1, tick=lambda *_: None)
    assert read_model(tmp_path / "streamed").digest() == read_model(tmp_path / "from dense").digest()


def by_projection(**down):
    """Arguments of `mlx_lm.convert`: `down_proj` of experts otherwise than the rest."""
    usual = {"group_size": 32, "bits": 4, "mode": "affine"}
    predicate = lambda path, module: {**usual, **(down if "switch_mlp.down_proj" in path else {})}  # noqa: E731
    return {"quant_predicate": predicate, "q_group_size": 32}


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
def test_projections_of_experts_may_have_several_widths(engine, tmp_path):
    """As in `mixed_4_6`. An engine has them on the widest grid, with the same values."""
    theirs = converted(tmp_path, by_projection(bits=6), family="qwen3_moe")
    to_artifact(read_model(theirs), tmp_path / "artifact")
    opened = qkit.load(tmp_path / "artifact", backend=engine)
    wanted = np.array(mlx_lm.load(str(theirs))[0](mx.array(TOKENS)).astype(mx.float32))
    assert np.abs(qkit.backend(engine).logits(opened, TOKENS) - wanted).max() <= 3e-6 * np.abs(wanted).max()
    qkit.save(opened, tmp_path / "again", source=tmp_path / "artifact")
    assert all(row.equal for row in compare(read_model(tmp_path / "artifact"), read_model(tmp_path / "again")))


def test_projections_of_experts_with_several_groups_are_refused_by_name(tmp_path):
    to_artifact(
        read_model(converted(tmp_path, by_projection(group_size=64), family="qwen3_moe")), tmp_path / "artifact"
    )
    with pytest.raises(
        qkit.ArtifactError, match=r"experts of \S+ are on several grids, int4-g32-affine, int4-g64-affine"
    ):
        qkit.load(tmp_path / "artifact", backend="mlx")


def test_commands_take_the_directory(tmp_path):
    theirs = converted(tmp_path, "both stacks")
    (tmp_path / "text.txt").write_text("a text to measure on, in bytes. " * 40)
    for words in (
        ["inspect", str(theirs)],
        ["import", str(theirs), str(tmp_path / "artifact")],
        ["eval", str(theirs), "--data", str(tmp_path / "text.txt")],
        ["diff", str(theirs), str(tmp_path / "artifact")],
    ):
        found = CliRunner().invoke(application, words)
        assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda held: held.pop(f"{PATHS[0]}unembed_out.weight"), r"layers\.0\.self_attn: weight is missing"),
        (lambda held: held.pop(f"{PATHS[0]}embed_q.biases"), r"layers\.0\.self_attn"),
        (
            lambda held: held.update({f"{PATHS[1]}embed_q.weight": held[f"{PATHS[1]}embed_q.weight"][:1]}),
            r"layers\.1\.self_attn",
        ),
    ],
)
def test_a_stack_that_is_missing_or_does_not_fit_is_refused_by_name(damage, says, tmp_path):
    theirs = converted(tmp_path, "both stacks")
    held = {name: np.array(array) for name, array in read_folder(theirs)[0].items()}
    damage(held)
    for file in theirs.glob("*.safetensors*"):
        file.unlink()
    save_file(held, theirs / "model.safetensors")
    with pytest.raises(qkit.ArtifactError, match=says):
        read_model(theirs)
    assert "quantization" in json.loads((theirs / "config.json").read_text())
