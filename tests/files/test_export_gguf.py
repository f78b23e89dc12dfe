"""GGUF: the same codes in blocks of 32, as gguf itself decodes them, or refused by name."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import quantized
from models import weight
from tables import DTYPES

import qkit
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.import_model import read_model
from qkit.exchange.write_model import weights_only
from qkit.formats.gguf import kind_of, store
from qkit.formats.packed import pack
from qkit.grid import Grid

gguf = pytest.importorskip("gguf")

HELD = {
    "Q4_0": [
        *(Grid("int4", 32), Grid("int4", 64, "absmax"), Grid("int4", "row", "midmax"), Grid("int4", "tensor")),
        *(Grid("int3", 32), Grid("int2", 64), Grid("int3", 32, "minmax"), Grid("int2", "row", "minmax")),
    ],
    "Q5_0": [Grid("int5", 32), Grid("int5", 128, "absmax"), Grid("int4", 32, "minmax")],
    "Q8_0": [
        *(Grid("int8", 32), Grid("int8", 128, "signed"), Grid("int8", "row")),
        *(Grid("int6", 32), Grid("int5", 32, "minmax"), Grid("int6", 64, "minmax")),
    ],
    "MXFP4": [Grid("e2m1", 32), Grid("e2m1", 64, "floor"), Grid("e2m1", "row", "even")],
    "NVFP4": [Grid("e2m1", 16, "nvfp4")],
}
#: SHA-256, shortened, of the blocks of all grids of a type together.
BYTES = {
    "Q4_0": "961d12d5b3e71603",
    "Q5_0": "d1e11b701b20bc6d",
    "Q8_0": "5311001655cf4e66",
    "MXFP4": "953d423ee71a5c7d",
    "NVFP4": "483541c208a8a02e",
}
REFUSED = [Grid("int8", 32, "minmax"), Grid("int4", 16), Grid("e4m3", 32), Grid("e5m2", 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "grid"), [(kind, grid) for kind, grids in HELD.items() for grid in grids], ids=str)
def test_gguf_decodes_what_the_reference_does(kind, grid, dtype):
    q = qkit.quantize(weight(dtype), grid)
    assert kind_of(pack(q)) == kind
    assert np.array_equal(decoded(q), qkit.dequantize(replace(q, dtype="float32")))


@pytest.mark.parametrize("kind", HELD)
def test_the_bytes_of_blocks_stay_those_of_the_first_exports(kind):
    blocks = b"".join(store(pack(qkit.quantize(weight(), grid))).tobytes() for grid in HELD[kind])
    assert hashlib.sha256(blocks).hexdigest()[:16] == BYTES[kind]


def decoded(q):
    """The values by gguf itself, which leaves the product with NVFP4's scale of the tensor to the reader."""
    values = gguf.dequantize(store(pack(q)), gguf.GGMLQuantizationType[kind_of(pack(q))])
    return values if q.tensor_scale is None else values * q.tensor_scale


@pytest.mark.parametrize(("element", "kind"), [("int4", "Q4_1"), ("int5", "Q5_1")])
def test_offsets_that_are_float16_take_the_smaller_type(element, kind):
    q = qkit.quantize(weight(), Grid(element, 32, "minmax"))
    q = replace(q, scales=np.exp2(np.round(np.log2(q.scales))))  # a power of two times a zero point is a float16
    assert kind_of(pack(q)) == kind
    assert np.array_equal(decoded(q), qkit.dequantize(q))


@pytest.mark.parametrize("grid", [Grid("int4", 64), Grid("int4", "row", "minmax"), Grid("int8", "tensor")], ids=str)
def test_a_group_of_zeros_is_exact_though_its_scale_is_no_float16(grid):
    w = weight()
    w[3] = 0  # a dead neuron
    q = qkit.quantize(w if grid.group != "tensor" else w * 0, grid)
    assert abs(q.scales).min() == 2.0**-96
    assert np.array_equal(decoded(q), qkit.dequantize(q))


def test_the_layout_of_a_block_is_ggml_s():
    codes = np.arange(-16, 16) // 2
    w = (codes * 0.5).astype(np.float32)[None]
    q = qkit.quantize(w, Grid("int4", 32, "signed"))
    assert np.array_equal(q.codes[0], codes)
    (block,) = store(pack(q))
    assert block[:2].view(np.float16)[0] == 0.5
    assert block[2:].tolist() == [(codes[i] + 8) | (codes[i + 16] + 8) << 4 for i in range(16)]


@pytest.mark.parametrize("grid", REFUSED, ids=str)
def test_what_gguf_cannot_hold_is_refused_with_the_way_out(grid):
    with pytest.raises(qkit.ArtifactError, match=rf"GGUF holds no rows of 256 on {grid}.*--to dense"):
        store(pack(qkit.quantize(weight(), grid)))


@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_scales_that_are_no_float16_are_counted(scale):
    q = qkit.quantize(weight(scale=scale), Grid("int8", 128))
    with pytest.raises(qkit.ArtifactError, match="48 of 48 scales are no float16"):
        store(pack(q))


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    source = read_model(quantized(tmp_path, "int4-g32"))
    path = "model.layers.1.mlp.up_proj"
    zeros = qkit.Rule(("*",), weight=Grid("int8", 32, "minmax"))
    wrong = {**source.weights, path: replace(source.weights[path], rule=zeros)}
    with pytest.raises(qkit.ArtifactError, match=rf"{path}\.weight: GGUF holds no rows of 128 on int8-g32-minmax"):
        export_gguf(replace(source, weights=wrong), tmp_path / "model.gguf")

    def broken():
        raise qkit.ArtifactError("half way")

    wrong = {**source.weights, path: replace(source.weights[path], read=broken)}
    with pytest.raises(qkit.ArtifactError, match=r"up_proj\.weight: half way"):
        export_gguf(replace(source, weights=wrong), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".*"))
    export_gguf(source, tmp_path / "model.gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(qkit.ArtifactError, match=r"model\.gguf exists: remove it"):
        export_gguf(source, tmp_path / "model.gguf")
    export_gguf(source, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "how GGUF writes a 'gpt_neox' is not known"),
        ({"hidden_act": "relu"}, "a 'llama' with hidden_act 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "a rope of type 'dynamic'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "a rope of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "a rope of type 'yarn' and mscale"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a rope of type 'default'"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "llama3"}}, "a rope of type 'llama3'"),
        ({"sliding_window": 64}, "a sliding window of 64"),
        ({"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144"),
    ],
)
def test_a_model_that_gguf_would_compute_otherwise_is_refused(change, message, tmp_path):
    source = read_model(quantized(tmp_path, "int4-g32"))
    with pytest.raises(qkit.ArtifactError, match=message):
        export_gguf(replace(source, config={**source.config, **change}), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_tensors_without_a_name_there_are_refused(tmp_path):
    source = read_model(quantized(tmp_path, "int4-g32"))
    strange = {**source.tensors, "model.thing.weight": np.zeros(3, np.float32)}
    with pytest.raises(qkit.ArtifactError, match=r"model\.thing\.weight: GGUF has no name for it in a 'llama'"):
        export_gguf(replace(source, tensors=strange), tmp_path / "model.gguf")


def test_norms_are_one_plus_w_rounded_to_float32_as_transformers_rounds(tmp_path):
    import torch
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    source = read_model(quantized(tmp_path, "int4-g32", family="gemma2", query_pre_attn_scalar=32))
    norm = np.random.default_rng(0).standard_normal(128).astype(np.float32) * 0.1  # of a trained model: no whole 256ths
    export_gguf(replace(source, tensors={**source.tensors, "model.norm.weight": norm}), tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    theirs = Gemma2RMSNorm(128, eps=0.0)
    theirs.weight.data = torch.from_numpy(norm)
    ones = torch.ones(1, 128)  # whose norm is 1, so that the output is 1 + w
    assert np.array_equal(found["output_norm.weight"], theirs(ones)[0].detach().numpy())


def test_every_tensor_is_in_the_file_with_its_codes(tmp_path):
    source = read_model(quantized(tmp_path, "mxfp4-a16", dtype="bfloat16"))
    export_gguf(source, tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == 21
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert (kinds["blk.0.ffn_up.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == (
        "MXFP4",
        "BF16",
        "F32",
    )
    held = source.weights["model.layers.0.mlp.up_proj"].read()
    assert np.array_equal(found["blk.0.ffn_up.weight"].data, store(held))


def test_activations_are_not_lost_unless_asked(tmp_path):
    from typer.testing import CliRunner

    from qkit.cli.application import application

    folder = quantized(tmp_path, "int8-dynamic-act-int4-weight")
    command = ["export", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]
    failed = CliRunner().invoke(application, command)
    assert isinstance(failed.exception, qkit.ArtifactError)
    done = CliRunner().invoke(application, [*command, "--weights-only"])
    assert done.exit_code == 0
    assert "quantized weights: 14 as Q4_0" in done.output
    assert not weights_only(read_model(folder)).weights["model.layers.0.mlp.up_proj"].rule.activation
