"""Other programs' quantized models: every value equals that of the owner's own decoder, or of its published formula."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from foreign import AWQ_ORDER, BF16, E8M0, awq, fp8, gptq, is_linear, nvfp4, rewritten
from models import make
from safetensors.numpy import save_file

import qkit
from qkit.exchange import diff
from qkit.exchange.export_model import export_dense
from qkit.exchange.import_model import read_model, to_artifact
from qkit.exchange.load_any import load_any
from qkit.exchange.write_model import weights_only
from qkit.formats.packed import unpack
from qkit.sources import law
from qkit.storage.arrays import read_file
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan
from qkit.training.model import build_float_model

GOLDEN = Path(__file__).parents[1] / "golden" / "llm-compressor"
GPTQ = {"quant_method": "gptq", "group_size": 64, "desc_act": False, "sym": False}


def values(folder):
    """The values that qkit reads, by name, of the weights that the files hold as codes."""
    found = read_model(folder)
    held = {f"{path}.weight": weight for path, weight in found.weights.items()}
    out = {name: qkit.dequantize(unpack(weight.read())) for name, weight in held.items()}
    return {**out, **{name: np.asarray(array) for name, array in found.tensors.items() if is_linear(name)}}


def parts(folder):
    """The stored tensors of each quantized layer, by path and name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, array in read_file(file)[0].items():
            path, _, last = name.rpartition(".")
            found.setdefault(path, {})[last] = np.array(array)
    return {path: mine for path, mine in found.items() if path.split(".")[-1] in LINEAR_NAMES and len(mine) > 1}


def read_arrays(file):
    """The tensors of a file, in memory, since tests write the file anew."""
    return {name: np.array(array) for name, array in read_file(file)[0].items()}


NUMBERS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)  #: of the linear weights of the small Llama
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def same(ours, theirs, dtype):
    """Equal in every bit, after one rounding of their float32 values."""
    assert ours.dtype == np.dtype(dtype)
    kind = f"u{ours.dtype.itemsize}"
    return np.array_equal(ours.view(kind), np.asarray(theirs, np.float32).astype(dtype).view(kind))


def field(words, bits, place):
    """The code at `place` of rows of int32 words, from Python's whole numbers."""
    numbers = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words]
    return np.array([(number >> (bits * place)) & ((1 << bits) - 1) for number in numbers])


@pytest.mark.parametrize("order", ["contiguous", "permuted", "absent"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, version, order, tmp_path):
    """AutoGPTQ's formula: scale of the input's group, times code less zero point; version 1 stores that zero less one."""
    settings = {**GPTQ, "bits": bits, "checkpoint_format": version, "desc_act": order == "permuted"}
    folder = rewritten(tmp_path / "m", gptq(bits, 64, version=version, order=order), settings)
    ours, count = values(folder), 0
    for path, mine in parts(folder).items():
        n = mine["qweight"].shape[0] * 32 // bits
        groups = mine.get("g_idx", np.arange(n) // 64)
        codes = np.stack([field(mine["qweight"].T, bits, i) for i in range(n)], axis=1)
        zeros = np.stack([field(mine["qzeros"], bits, i) for i in range(codes.shape[0])], axis=0) + (version == "gptq")
        scales = mine["scales"].T.astype(np.float32)
        assert same(ours[f"{path}.weight"], (codes - zeros[:, groups]) * scales[:, groups], BF16)
        count += codes.size
    assert count == NUMBERS


def test_awq(tmp_path):
    """AutoAWQ's formula, with its order of columns."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    folder = rewritten(tmp_path / "m", awq(64), settings, dtype="float16")
    ours, count = values(folder), 0
    for path, mine in parts(folder).items():
        n, out = mine["qweight"].shape[0], mine["scales"].shape[1]

        def plain(words, out=out):
            columns = np.empty((len(words), out), int)
            for word in range(out // 8):
                for place, column in enumerate(AWQ_ORDER):
                    columns[:, 8 * word + column] = (words[:, word].view(np.uint32) >> (4 * place)) & 15
            return columns

        wide = lambda x: np.repeat(x, 64, axis=0)  # noqa: E731
        theirs = (plain(mine["qweight"]) - wide(plain(mine["qzeros"]))) * wide(mine["scales"].astype(np.float32))
        assert same(ours[f"{path}.weight"], theirs.T, np.float16)
        count += n * out
    assert count == NUMBERS


@pytest.mark.parametrize("scale", [np.float32, BF16, E8M0], ids=["float32", "bfloat16", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)], ids=str)
def test_fp8_blocks(block, scale, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    folder = rewritten(tmp_path / "m", fp8(block, scale=scale), settings)
    decoder = Fp8Dequantize(None)
    ours = values(folder)
    found = parts(folder)
    for path, mine in found.items():
        codes = torch.from_numpy(mine["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
        scales = mine["weight_scale_inv"]
        scales = (
            torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e8m0fnu)
            if scale is E8M0
            else torch.from_numpy(scales.astype(np.float32)).to(torch.bfloat16 if scale is BF16 else torch.float32)
        )
        theirs = decoder.convert({"weight": codes, "weight_scale_inv": scales})["weight"].to(torch.bfloat16)
        assert np.array_equal(ours[f"{path}.weight"].view(np.uint16), theirs.view(torch.uint16).numpy()), path
    assert len(found) == 14


def test_fp8_blocks_may_be_ragged_and_their_scales_in_another_shard(tmp_path):
    """DeepSeek's own rule: the last block of a row or column has fewer numbers."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = rewritten(
        tmp_path / "m",
        fp8((128, 128)),
        settings,
        hidden_size=160,
        intermediate_size=200,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    tensors = read_arrays(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for shard in set(shards.values()):
        save_file({name: x for name, x in tensors.items() if shards[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = values(folder)
    for name, array in ours.items():
        rows, columns = array.shape
        scales = np.repeat(np.repeat(tensors[f"{name}_scale_inv"], 128, 0), 128, 1)[:rows, :columns]
        assert same(array, tensors[name].astype(np.float32) * scales, BF16), name
    assert {array.shape for array in ours.values()} == {(160, 160), (200, 160), (160, 200)}


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_modelopt(algorithm, tmp_path):
    """The formula of ModelOpt's checkpoints: code times block scale times the scale of the tensor."""
    encode = fp8(None, name="weight_scale") if algorithm == "FP8" else nvfp4()
    folder = rewritten(tmp_path / "m", encode, None)
    table = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]},
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(table))
    ours, stored = values(folder), parts(folder)
    for path, mine in stored.items():
        if algorithm == "FP8":
            theirs = mine["weight"].astype(np.float32) * mine["weight_scale"]
        else:
            table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
            codes = np.stack([mine["weight"] & 15, mine["weight"] >> 4], -1).reshape(len(mine["weight"]), -1)
            steps = mine["weight_scale"].astype(np.float32) * mine["weight_scale_2"]
            theirs = table[codes] * np.repeat(steps, 16, 1)
        assert same(ours[f"{path}.weight"], theirs, BF16), path
    assert len(stored) == 14


def gpt_oss(folder):
    """A gpt-oss model as its publishers store it, with random codes; and the blocks and scales of each stack."""
    folder = make(folder, "gpt_oss", dtype="bfloat16")
    tensors, random = read_arrays(folder / "model.safetensors"), np.random.default_rng(0)
    stacks = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, n, out = tensors.pop(name).shape
        stacks[name] = (
            random.integers(0, 256, (experts, out, n // 32, 16)).astype(np.uint8),
            random.integers(90, 140, (experts, out, n // 32)).astype(np.uint8),
        )
        tensors |= {f"{name}_blocks": stacks[name][0], f"{name}_scales": stacks[name][1]}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder, stacks


def test_gpt_oss_s_experts(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, stacks = gpt_oss(tmp_path / "m")
    found, encoded = read_model(folder), decoded(folder)
    assert len(stacks) == 4
    for name, (blocks, scales) in stacks.items():
        theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
        ours = encoded[name]
        assert np.array_equal(ours.view(np.uint16), theirs.view(torch.uint16).numpy()), name
        block, fused = name.rpartition(".")[0], name.endswith("gate_up_proj")
        for expert in range(4):
            for place, projection in enumerate(("gate_proj", "up_proj") if fused else ("down_proj",)):
                mine = qkit.dequantize(unpack(found.weights[f"{block}.{expert}.{projection}"].read()))
                assert np.array_equal(mine, ours[expert].T[place :: 2 if fused else 1])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "MXFP4A16", "NVFP4A16", "W8A8", "FP8_DYNAMIC"])
def test_llm_compressor_s_files(scheme):
    torch = pytest.importorskip("torch")
    base = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file as load

    config = json.loads((GOLDEN / scheme / "config.json").read_text())["quantization_config"]
    given = QuantizationConfig.model_validate(config)
    [group] = given.config_groups.values()
    decoder = base.BaseCompressor.get_value_from_registry(group.format or given.format)
    tensors, ours, count = load(GOLDEN / scheme / "model.safetensors"), decoded(GOLDEN / scheme), 0
    for name, array in ours.items():
        path = name.removesuffix(".weight")
        mine = {full.removeprefix(f"{path}."): x for full, x in tensors.items() if full.startswith(f"{path}.")}
        theirs = decoder.decompress(mine, group)["weight"].to(torch.bfloat16)
        assert np.array_equal(array.view(np.uint16), theirs.view(torch.uint16).numpy()), name
        count += array.size
    assert count == 90_112


def decoded(folder, dtype=None):
    """The values of the forms, without any grid of qkit's; in `dtype`, which may be another one than the model's."""
    from qkit.artifact.config import read_config
    from qkit.artifact.foreign import open_any
    from qkit.storage.read import read_folder

    stored, _ = read_folder(folder)
    found = open_any(folder, stored, read_config(folder)).encoded
    return {
        name: one.mapped() if dtype is None else law.values(one.codes()).astype(dtype) for name, one in found.items()
    }


OTHERS = GOLDEN.parent / "others"  # made by golden/other_programs.py and more_programs.py
#: Those whose programs decode in float16.
HALF = (
    *(one.name for one in OTHERS.glob("gptq-*")),
    *(f"auto-round{kind}" for kind in ("", "-2", "-3", "-8", "-awq", "-gptq", "-mixed", "-own-awq")),
)
#: Those whose owner's values have no -0: ModelOpt decodes e2m1's code of -0 as 0, and AutoRound's layers were asked by a
#: product with a unit matrix.
UNSIGNED = (
    *("modelopt-nvfp4", "modelopt-w4a16-nvfp4", "modelopt-w4a8-nvfp4"),
    *(f"auto-round{kind}" for kind in ("", "-2", "-3", "-8", "-gptq", "-mixed")),
)
#: Those whose codes no grid of qkit's holds.
VALUES = (
    *("gptq-4-order", "bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-int8", "modelopt-fp8-blocks"),
    *("modelopt-int8-smooth", "modelopt-w4a8-nvfp4"),
)


@pytest.mark.parametrize("name", sorted(entry.name for entry in OTHERS.iterdir()))
def test_real_files_of_other_programs(name):
    """Those of six programs: equal to the values that the programs decoded, by their digests."""
    folder, count = OTHERS / name, 0
    ours = decoded(folder, np.float16 if name in HALF else None)
    file = folder / "values.json"
    for path, digest in json.loads(file.read_text()).items():
        if name in UNSIGNED:
            ours[path] = ours[path] + ours[path].dtype.type(0)
        assert hashlib.sha256(ours[path].tobytes()).hexdigest() == digest, path
        count += ours[path].size
    assert count == 24_576


@pytest.mark.parametrize("name", sorted(entry.name for entry in OTHERS.iterdir()))
def test_an_artifact_of_such_a_file_holds_the_same_values(name, tmp_path):
    source = weights_only(read_model(OTHERS / name))
    to_artifact(source, tmp_path / "own")
    again = read_model(tmp_path / "own")
    assert again.digest() == source.digest()
    held = {f"{path}.weight": qkit.dequantize(unpack(weight.read())) for path, weight in again.weights.items()}
    for path, array in decoded(OTHERS / name).items():
        mine = held.get(path, again.tensors.get(path))
        assert mine.tobytes() == array.tobytes(), path
    assert bool(held) == (name not in VALUES)


def quantize(folder, out, recipe="int4-g32"):
    plan = make_plan(folder, qkit.recipe(recipe))
    return quantize_directory(plan, out, engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)


@pytest.mark.parametrize("name", sorted(entry.name for entry in OTHERS.iterdir()))
def test_quantizing_while_decoding_equals_quantizing_the_decoded_model(name, tmp_path):
    """The decoded model is `export --to dense`; the bytes of both outputs are equal."""
    export_dense(weights_only(read_model(OTHERS / name)), tmp_path / "dense")
    quantize(OTHERS / name, tmp_path / "a")
    quantize(tmp_path / "dense", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    rows = list(diff.compare(weights_only(read_model(OTHERS / name)), read_model(tmp_path / "dense")))
    assert all(row.equal for row in rows)
    assert len(rows) == 12


def test_gpt_oss_s_experts_are_quantized_while_decoding_as_their_float_model_is(tmp_path):
    folder, stacks = gpt_oss(tmp_path / "m")
    source = read_model(folder)
    export_dense(source, tmp_path / "single")  # experts one by one
    quantize(folder, tmp_path / "a", "nvfp4-a16")
    alone = qkit.Recipe("linear", (qkit.Rule(("*",), kind="linear", weight=qkit.Grid("int4", 32)),))
    plan = make_plan(folder, alone)
    quantize_directory(plan, tmp_path / "b", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    copied = read_file(tmp_path / "b" / "model.safetensors")[0]
    ours, floats = decoded(folder), read_model(tmp_path / "a")
    for name in stacks:
        assert copied[name].tobytes() == ours[name].tobytes(), name
    for path, weight in source.weights.items():
        w = qkit.dequantize(unpack(weight.read()))
        theirs = unpack(floats.weights[path].read())
        assert np.array_equal(theirs.codes, requantized(w, theirs)), path


def requantized(w, q):
    """The codes of `w` under the tensor scale of `q`, which gate and up share."""
    peak = float(q.tensor_scale) * 6 * 448
    return qkit.reference.quantize(w, q.grid, peak=peak).codes


@pytest.mark.parametrize("name", ["gptq-4", "gptq-4-order", "ct-fp8-block", "auto-round-awq"])
def test_a_run_opens_such_a_model(name):
    pytest.importorskip("torch")
    engine = qkit.backend("torchao")
    source = read_model(OTHERS / name)
    model = build_float_model(engine, source, dtype="float32")
    exact, rounded = decoded(OTHERS / name, np.float32), decoded(OTHERS / name)
    held = {
        f"{path}.weight" for path in source.weights
    }  # grids have float32 values, other codes those of the model's type
    ours = {path: exact[path] if path in held else rounded[path] for path in exact}
    for path, tensor in engine.tensors(model).items():
        if path in ours:
            assert np.array_equal(engine.to_numpy(tensor), ours[path].astype(np.float32)), path


@pytest.mark.parametrize("engine", ["torchao", "mlx"])
@pytest.mark.parametrize("name", ["gptq-4", "gptq-4-order", "ct-nvfp4", "ct-fp8", "ct-w4a16-fp16", "auto-round-awq"])
def test_both_engines_compute_with_the_decoded_values(name, engine, tmp_path):
    if not any(status.name == engine and status.ready for status in qkit.backends()):
        pytest.skip(f"{engine} is not installed")
    source, backend, tokens = weights_only(read_model(OTHERS / name)), qkit.backend(engine), np.arange(18).reshape(2, 9)
    export_dense(source, tmp_path / "dense")
    with qkit.exact():
        packed, dense = load_any(source, backend), qkit.load(tmp_path / "dense", backend=backend)
        ours, theirs = backend.logits(packed, tokens), backend.logits(dense, tokens)
    if engine == "mlx":  # MLX's own layers multiply by codes in the model's 16 bits, with other roundings
        assert np.allclose(ours, theirs, atol=5e-3)
    else:
        assert np.array_equal(ours, theirs)
