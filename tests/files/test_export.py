"""Exports: the same codes under other names, exactly, or refused by name."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from checkpoints import quantized
from models import weight
from tables import DTYPES
from tables import FILE_GRIDS as GRIDS

import qkit
from qkit.exchange.export_model import export_dense, export_mlx
from qkit.exchange.import_model import read_model
from qkit.exchange.write_model import weights_only
from qkit.formats import compressed_tensors, dense, mlx_lm
from qkit.formats.mlx_families import FAMILIES
from qkit.formats.packed import pack, unpack
from qkit.grid import Grid
from qkit.storage.arrays import read_file
from qkit.storage.batches import BYTES, in_turn
from qkit.storage.read import read_folder
from qkit.storage.seal import digests_of, read_seal
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan


def same(a, b):
    """Whether two QTensors are the same bytes."""
    mine, theirs = a.parts(), b.parts()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and np.array_equal(mine[name], theirs[name]) for name in mine
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_goes_through_mlx_and_back(grid, dtype):
    q = qkit.quantize(weight(dtype), grid)
    stored = mlx_lm.store(pack(q))
    back = mlx_lm.restore(stored, grid=grid, dtype=dtype, shape=q.shape)
    assert same(unpack(back), q)


@pytest.mark.parametrize("recipe", ["int4-g64", "int8-g128", "int4-g32-all"])
def test_the_digests_of_an_export_are_those_of_its_bytes_though_copies_keep_the_artifact_s(recipe, tmp_path):
    source = read_model(quantized(tmp_path, recipe))
    export_mlx(source, tmp_path / "mlx")
    stored, _ = read_folder(tmp_path / "mlx")
    seal = read_seal(tmp_path / "mlx")
    assert seal.tensors == digests_of(list(stored.values()))
    own = set(read_seal(source.folder).tensors.values())
    assert own & set(seal.tensors.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_header_is_known_before_the_tensors(grid, dtype):
    packed = pack(qkit.quantize(weight(dtype), grid))
    for layout in (mlx_lm, compressed_tensors, dense):
        if layout is compressed_tensors and grid.element.kind == "float" and grid.group == 64:
            continue
        stored = {name: (array.dtype.name, array.shape) for name, array in layout.store(packed).items()}
        assert stored == layout.contents(grid, dtype=dtype, shape=packed.shape)


@pytest.mark.parametrize("grid", [Grid("int4", 64), Grid("int3", 32), Grid("int8", "row"), Grid("e2m1", 32)], ids=str)
def test_mlx_and_compressed_tensors_have_the_same_code_bytes(grid):
    packed = pack(qkit.quantize(weight(), grid))
    assert mlx_lm.store(packed)["weight"].tobytes() == compressed_tensors.store(packed)["weight_packed"].tobytes()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mlx_decodes_what_the_reference_does(grid):
    mx = pytest.importorskip("mlx.core")
    q = qkit.quantize(weight(), grid)
    stored = {name: mx.array(np.asarray(array)) for name, array in mlx_lm.store(pack(q)).items()}
    container = mlx_lm.layout(grid, 256)
    values = mx.dequantize(
        stored["weight"],
        stored["scales"],
        stored.get("biases"),
        group_size=container.group,
        bits=container.bits,
        mode=container.mode,
        dtype=mx.float32,
    )
    assert np.array_equal(np.array(values), qkit.dequantize(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("rule", ["signed", "absmax", "midmax", "minmax"])
def test_scales_and_biases_are_stored_exactly_in_bfloat16_only_where_mlx_decodes_well_in_it(rule, bits, dtype):
    q = qkit.quantize(weight(dtype), Grid(f"int{bits}", 64, rule))
    stored = mlx_lm.store(pack(q))
    zeros = 2 ** (bits - 1) if q.zeros is None else q.zeros.astype(np.float32)
    assert np.array_equal(stored["scales"].astype(np.float32), q.scales)
    assert np.array_equal(stored["biases"].astype(np.float32), -zeros * q.scales)
    narrow = dtype == "bfloat16" and rule != "minmax" and bits <= 4
    assert stored["scales"].dtype == stored["biases"].dtype == (ml_dtypes.bfloat16 if narrow else np.float32)


@pytest.mark.parametrize("grid", [Grid("int4", 48), Grid("int8", 16), Grid("e2m1", 48), Grid("e5m2", 32)], ids=str)
def test_what_mlx_cannot_hold_is_refused_with_the_way_out(grid):
    with pytest.raises(qkit.ArtifactError, match=rf"MLX holds no rows of 96 on {grid}.*--to dense"):
        mlx_lm.store(pack(qkit.quantize(weight(shape=(4, 96)), grid)))


def test_nvfp4_is_folded_into_its_block_scales_where_that_is_exact():
    grid = Grid("e2m1", 16, "nvfp4")
    q = qkit.quantize(weight(scale=700.0), grid)
    assert float(q.tensor_scale) == 2.0
    stored = mlx_lm.store(pack(q))
    folded = stored["scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(folded, q.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 2)
    back = mlx_lm.restore(stored, grid=grid, dtype="float32", shape=q.shape)
    assert np.array_equal(qkit.dequantize(unpack(back)), qkit.dequantize(q))


def test_nvfp4_whose_power_of_two_does_not_fit_is_refused_with_a_count():
    q = qkit.quantize(weight(scale=0.01), Grid("e2m1", 16, "nvfp4"))
    with pytest.raises(qkit.ArtifactError, match=r"\d+ of 384 block scales times its 2\^-\d+ are no e4m3: use mxfp4"):
        mlx_lm.store(pack(q))


def test_row_blocks_of_a_weight_are_the_weight():
    for grid in (Grid("int4", 64, "minmax"), Grid("int8", "tensor"), Grid("e2m1", 16, "nvfp4")):
        packed = pack(qkit.quantize(weight(), grid))
        blocks = [dense.store(packed.rows(start, start + 7))["weight"] for start in range(0, 24, 7)]
        assert np.array_equal(np.concatenate(blocks), dense.store(packed)["weight"])


def test_the_configuration_speaks_of_mixed_grids_layer_by_layer(tmp_path):
    rules = (
        qkit.Rule(("*.down_proj",), weight=Grid("int8", 32)),
        qkit.Rule(("*.up_proj",), weight=Grid("e2m1", 32)),
        qkit.Rule(("*_proj",), weight=Grid("int4", 64)),
    )
    source = read_model(quantized(tmp_path, qkit.Recipe("mixed", rules)))
    export_mlx(source, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    said = config["quantization"]
    assert config["quantization_config"] == said
    assert {name: said[name] for name in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert said["model.layers.1.mlp.down_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert said["model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert len(said) == 3 + 4
    model, _ = pytest.importorskip("mlx_lm").load(str(tmp_path / "mlx"))
    layer = model.model.layers[1].mlp
    assert [(m.bits, m.group_size, m.mode) for m in (layer.down_proj, layer.up_proj, layer.gate_proj)] == [
        (8, 32, "affine"),
        (4, 32, "mxfp4"),
        (4, 64, "affine"),
    ]


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default", "rope_theta": 30000.0}, {"rope_theta": 30000.0}),
        (
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_the_rotary_embedding_is_said_in_mlx_lm_s_words(rope, wanted, tmp_path):
    source = read_model(quantized(tmp_path, "int4-g64", rope_parameters=rope))
    export_mlx(source, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert {name: config[name] for name in wanted} == wanted


def test_a_rotary_embedding_that_mlx_lm_would_ignore_is_refused(tmp_path):
    source = read_model(quantized(tmp_path, "int4-g64"))
    unknown = replace(source, config={**source.config, "model_type": "starcoder9"})
    with pytest.raises(
        qkit.ArtifactError, match=r"how mlx-lm reads a 'starcoder9', its rotary embedding.* is not known"
    ):
        export_mlx(unknown, tmp_path / "mlx")
    partial = replace(source, config={**source.config, "rope_parameters": {"partial_rotary_factor": 0.5}})
    with pytest.raises(qkit.BackendError, match="rotates all of a 'llama'"):
        export_mlx(partial, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


#: Types of language models that mlx-lm has inside of others alone.
NESTED = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_vl_moe_text"}


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - NESTED))
def test_the_table_of_rotary_names_is_mlx_lm_s(kind):
    import inspect

    utils = pytest.importorskip("mlx_lm.utils")
    _, arguments = utils._get_classes({"model_type": kind})  # noqa: SLF001  mlx-lm has no public way
    known = {name for family in FAMILIES.values() for name in family.rope}
    assert known & set(inspect.signature(arguments).parameters) == set(FAMILIES[kind].rope)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "phimoe", "attention_bias": False}, "phimoe has biases everywhere"),
        ({"hidden_act": "gelu"}, "it computes silu in a 'llama' and not gelu, as hidden_act asks: export --to dense"),
        ({"model_type": "gpt_neox", "intermediate_size": 96, "hidden_act": "gelu"}, "four times the hidden size"),
        ({"model_type": "olmo3", "layer_types": ["sliding_attention"] * 2}, "wants a layer of full attention"),
        ({"model_type": "falcon_h1"}, "reads a 'falcon_h1'.* is not known"),
    ],
)
def test_a_model_that_mlx_lm_would_compute_otherwise_is_refused_by_name(changes, why, tmp_path):
    source = read_model(quantized(tmp_path, "int4-g64"))
    with pytest.raises(qkit.ArtifactError, match=why):
        export_mlx(replace(source, config={**source.config, **changes}), tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_a_layer_that_mlx_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    folder = quantized(tmp_path, "int8-row", intermediate_size=172)
    with pytest.raises(qkit.ArtifactError, match=r"model\.layers\.0\.mlp\.down_proj: MLX holds no rows of 172"):
        export_mlx(read_model(folder), tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("export", [export_mlx, export_dense])
def test_quantized_inputs_are_not_lost_unless_asked(export, tmp_path):
    source = read_model(quantized(tmp_path, "int8-dynamic-act-int4-weight"))
    with pytest.raises(qkit.ArtifactError, match=r"down_proj quantizes its inputs too.*--weights-only"):
        export(source, tmp_path / "out")
    export(weights_only(source), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_dense_is_a_plain_model_with_the_decoded_values(tmp_path):
    folder = quantized(tmp_path, "int4-g64-minmax", dtype="bfloat16")
    source = read_model(folder)
    export_dense(source, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    tensors, metadata = read_file(tmp_path / "dense" / "model.safetensors")
    original, _ = read_file(tmp_path / "float" / "model.safetensors")
    assert metadata == {"format": "pt"}
    for name, array in tensors.items():
        held = source.weights.get(name.removesuffix(".weight"))
        wanted = qkit.fake_quantize(np.asarray(original[name]), held.rule.weight) if held else original[name]
        assert array.dtype == wanted.dtype
        assert array.tobytes() == wanted.tobytes()


def test_the_source_is_not_the_target(tmp_path):
    folder = quantized(tmp_path, "int4-g64")
    with pytest.raises(qkit.ArtifactError, match="is the model to read: choose another folder"):
        export_mlx(read_model(folder), folder)


def test_exports_know_their_companions(tmp_path):
    folder = quantized(tmp_path, "int4-g64")
    export_mlx(read_model(folder), tmp_path / "mlx")
    names = {entry.name for entry in (tmp_path / "mlx").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_an_export_of_several_files_is_several_files(tmp_path):
    export_dense(read_model(quantized(tmp_path, "int4-g64")), tmp_path / "split", shard_bytes=60_000)
    source = tmp_path / "artifact"
    plan = make_plan(tmp_path / "split", qkit.recipe("int4-g64"), shard_bytes=20_000)
    quantize_directory(plan, source, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    most = max(file.stat().st_size for file in source.glob("*.safetensors"))
    export_mlx(read_model(source), tmp_path / "mlx")
    stored = read_folder(tmp_path / "mlx")[0].values()
    files = {one.file for one in stored}
    assert len(files) > 2
    assert all(sum(one.slot.nbytes for one in stored if one.file == file) <= most for file in files)
    assert read_model(tmp_path / "mlx").digests() == read_model(source).digests()


def test_threads_take_the_files_in_turn():
    sizes = {"a1": BYTES, "a2": BYTES, "b1": 1, "b2": BYTES, "c1": 1}
    turns = [*in_turn(sizes, sizes.__getitem__, group=lambda name: name[0])]
    assert turns == [["a1"], ["b1", "b2"], ["c1"], ["a2"]]
