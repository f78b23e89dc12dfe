"""GGUF files as models of transformers: names, rows and norms turned back; values equal to those that gguf decodes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import quantized
from models import make

import qkit
from qkit.exchange.export_gguf import export_gguf
from qkit.exchange.import_model import read_model, to_artifact
from qkit.exchange.load_any import load_any
from qkit.formats.packed import unpack
from qkit.sources.encoded import Encoded
from qkit.sources.gguf_blocks import GgufValues

gguf = pytest.importorskip("gguf")
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def values(snapshot):
    held = {f"{path}.weight": qkit.dequantize(unpack(one.read())) for path, one in snapshot.weights.items()}
    return {**held, **{name: np.asarray(array) for name, array in snapshot.tensors.items()}}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.array_equal(ours[name].astype(np.float32), array.astype(np.float32)), name


@pytest.mark.parametrize("recipe", ["int4-g32", "int8-g32", "int4-g32-minmax", "int5-g32", "mxfp4-a16", "nvfp4-a16"])
def test_qkit_s_own_files_come_back_value_by_value(recipe, tmp_path):
    source = read_model(quantized(tmp_path, recipe, dtype="bfloat16"))
    export_gguf(source, tmp_path / "m.gguf", fallback="f16")
    again = read_model(tmp_path / "m.gguf")
    assert len(again.weights) == len(source.weights)
    same(values(again), values(source))
    for path, one in again.weights.items():
        theirs = source.weights[path].read()
        if recipe in ("int4-g32", "int8-g32"):
            assert np.array_equal(unpack(one.read()).codes, unpack(theirs).codes), path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_its_float_model(family, tmp_path):
    folder = make(tmp_path / "m", family, dtype="bfloat16")
    source = read_model(folder)
    export_gguf(source, tmp_path / "m.gguf")
    again = read_model(tmp_path / "m.gguf")
    ours, theirs = values(again), values(source)
    if again.config["tie_word_embeddings"]:
        theirs.pop("lm_head.weight", None)
    same(ours, theirs)
    torch = qkit.backend("torchao")
    tokens = np.arange(18).reshape(2, 9)
    first, second = (torch.logits(load_any(one, torch), tokens) for one in (again, source))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "kind",
    [
        "Q4_0",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q4_1",
        "MXFP4",
        "NVFP4",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ],
)
def test_every_type_of_block_has_the_values_of_gguf(kind, tmp_path):
    folder = make(tmp_path / "m", "llama", dtype="float32", hidden_size=256, intermediate_size=256)
    source = read_model(folder)
    export_gguf(source, tmp_path / "float.gguf")
    blocks, wanted = {}, {}
    many, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    reader = gguf.GGUFReader(tmp_path / "float.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for one in reader.tensors:
        if one.name.startswith("blk.0.ffn") and one.name.endswith("up.weight"):
            rows, n = (int(size_) for size_ in reversed(one.shape))
            raw = random.integers(0, 256, (rows, n // many * size)).astype(np.uint8)
            raw = finite(raw, kind, size)
            blocks[one.name], wanted[one.name] = raw, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(one.name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(one.name, one.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_model(tmp_path / "m.gguf")
    ours = values(found)["model.layers.0.mlp.up_proj.weight"]
    assert ours.dtype == np.float32
    assert np.array_equal(ours, wanted["blk.0.ffn_up.weight"])
    assert bool(found.weights) == (kind in ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_1", "MXFP4", "NVFP4"))
    to_artifact(found, tmp_path / "own")
    assert np.array_equal(values(read_model(tmp_path / "own"))["model.layers.0.mlp.up_proj.weight"], ours)


def test_values_without_codes_say_so():
    weight = SimpleNamespace(form=GgufValues("Q4_K"), file="m.gguf", slot=SimpleNamespace(name="w"))
    with pytest.raises(qkit.ArtifactError, match=r"m\.gguf: w: no grid holds the codes of GGUF Q4_K: read its values"):
        Encoded.codes(weight)


def finite(raw, kind, size):
    """Random blocks without scales that are no number: halves below 2, E8M0 and e4m3 codes in the middle."""
    blocks = raw.reshape(len(raw), -1, size)
    if kind == "MXFP4":
        blocks[..., 0] = 100 + blocks[..., 0] % 40
    elif kind == "NVFP4":
        blocks[..., :4] = blocks[..., :4] % 126
    else:
        for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
            if place + 1 < size:
                blocks[..., place + 1] = blocks[..., place + 1] % 64
    return blocks.reshape(len(raw), -1)


def test_the_config_and_the_artifact_of_such_a_file_open(tmp_path):
    source = read_model(quantized(tmp_path, "int4-g32", dtype="bfloat16"))
    export_gguf(source, tmp_path / "m.gguf", fallback="f16")
    to_artifact(read_model(tmp_path / "m.gguf"), tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")} == {
        key: source.config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    }


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 32])
def test_a_damaged_file_is_bad_input(damage, tmp_path):
    (tmp_path / "m.gguf").write_bytes(damage)
    with pytest.raises(qkit.ArtifactError, match=r"m\.gguf is no sound GGUF file"):
        read_model(tmp_path / "m.gguf")
