"""Artifacts of earlier versions, whose fused weights have tensor scales of their own, get shared ones, exactly or not at all."""

import re
import warnings

import numpy as np
import pytest
from models import build
from typer.testing import CliRunner

import qkit
from qkit import fused
from qkit.cli.application import application
from qkit.exchange.import_model import read_model, to_artifact
from qkit.formats.packed import unpack

ENGINE = next(status.name for status in qkit.backends() if status.ready and status.name != "numpy")


def earlier(folder, factor):
    """An artifact whose key projections, `factor` times as large, have tensor scales of their own."""
    engine, model = qkit.backend(ENGINE), build(ENGINE)
    tensors = {name: engine.to_numpy(tensor).copy() for name, tensor in engine.tensors(model).items()}
    engine.fill(model, {name: w * np.float32(factor if "k_proj" in name else 1) for name, w in tensors.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "shares", lambda grid: False)
        qkit.save(qkit.convert(model, "nvfp4-a16"), folder)
    return folder


@pytest.mark.parametrize("verb", ["inspect", "inspect --json", "load and save"])
def test_layers_that_a_server_would_read_wrongly_are_named_with_the_way_out(verb, tmp_path):
    old = earlier(tmp_path / "old", 2.0**-4)
    to_artifact(read_model(old), tmp_path / "new")
    text = r"vLLM: reads \S+_proj, \S+_proj, \S+_proj, and 1 more such groups, wrongly, .*: qkit import DIR NEW"
    if verb == "load and save":
        with pytest.warns(qkit.errors.ServerWarning, match=text):
            qkit.save(qkit.load(old, backend=ENGINE), tmp_path / "again", backend=ENGINE)
        with warnings.catch_warnings(category=qkit.errors.ServerWarning, action="error"):
            qkit.save(qkit.load(tmp_path / "new", backend=ENGINE), tmp_path / "again", backend=ENGINE)
        return
    command = [verb.split()[0], *verb.split()[1:]]
    said = [CliRunner().invoke(application, [*command, str(folder)]) for folder in (old, tmp_path / "new")]
    assert [one.exit_code for one in said] == [0, 0]
    assert re.search(text, " ".join(said[0].output.split()))
    assert "vLLM" not in said[1].output


def scales(snapshot):
    return {path: float(weight.read().tensor_scale) for path, weight in snapshot.weights.items()}


def test_powers_of_two_move_into_block_scales(tmp_path):
    old = read_model(earlier(tmp_path / "old", 2.0**-4))
    to_artifact(old, tmp_path / "new")
    new = read_model(tmp_path / "new")
    groups = fused.groups(new.weights)
    assert len(groups) == 4
    assert any(len({scales(old)[path] for path in group}) > 1 for group in groups)
    assert all(len({scales(new)[path] for path in group}) == 1 for group in groups)
    for path, weight in new.weights.items():
        before, after = (unpack(one.read()) for one in (old.weights[path], weight))
        assert (before.codes == after.codes).all()
        assert (qkit.dequantize(before) == qkit.dequantize(after)).all()


def test_scales_that_would_lose_bits_are_refused_by_name_before_anything_is_written(tmp_path):
    old = read_model(earlier(tmp_path / "old", 2.0**-18))
    with pytest.raises(qkit.ArtifactError, match=r"k_proj: \d+ block scales are no e4m3 under the tensor scale"):
        to_artifact(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.v_proj", "linear_attn.g_proj"),
        ("attention.query", "attention.key", "attention.value"),
        ("experts.3.gate_proj", "experts.3.up_proj"),
        ("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3"),
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    ],
)
def test_layers_that_vllm_fuses_are_one_group(names):
    paths = [f"model.layers.0.{name}" for name in names]
    others = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert fused.groups([*others, *paths]) == [tuple(paths)]
