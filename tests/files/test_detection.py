"""Nothing quantized is ever taken for float: configurations as programs write them, each read right or refused by name."""

import json
from pathlib import Path
from re import search

import ml_dtypes
import numpy as np
import pytest
from foreign import awq, fp8, gptq, nvfp4
from safetensors.numpy import save_file
from typer.testing import CliRunner

import qkit
from qkit.artifact.inspect import inspect_directory
from qkit.cli.application import application
from qkit.exchange.import_model import read_model
from qkit.streaming.plan import make_plan

PATH = "model.layers.0.mlp.up_proj"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MLX = {"group_size": 32, "bits": 4}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def grouped(weights):
    """compressed-tensors' settings with these `weights` in their one group."""
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def packed(weight, random):
    words = random.integers(-(2**31), 2**31, (64, 8)).astype(np.int32)
    scales = random.random((64, 2)).astype(ml_dtypes.bfloat16)
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": np.array([64, 64])}


def mlx(weight, random):
    floats = {name: random.random((64, 2)).astype(np.float16) for name in ("scales", "biases")}
    return {"weight": random.integers(0, 2**32, (64, 8)).astype(np.uint32), **floats}


def bitsandbytes(weight, random):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    return {
        "weight": random.integers(0, 256, (2048, 1)).astype(np.uint8),
        "weight.absmax": np.ones(64, np.float32),
        "weight.quant_map": np.linspace(-1, 1, 16).astype(np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def rows8(weight, random):
    codes = random.integers(-127, 128, (64, 64)).astype(np.int8)
    return {"weight": codes, "SCB": np.ones(64, np.float32), "weight_format": np.zeros((), np.uint8)}


def awq_rows(weight, random):
    words = [random.integers(0, 2**31, (64, n)).astype(np.int32) for n in (8, 4)]
    return {"qweight": words[0], "qzeros": words[1], "scales": np.ones((64, 32), np.float16)}


def pairs_of_rows(*smooth, bits=4):
    codes = {4: np.zeros((32, 64), np.uint8), 8: np.zeros((64, 64), np.int8)}[bits]
    scales = np.ones((64, 2) if bits == 4 else 64, np.float32)
    more = {name: np.ones(64, ml_dtypes.bfloat16) for name in smooth}
    return lambda weight, random: {"weight": codes, "weight_scale": scales, **more}


def mxfp4(scale="weight_scale", codes="weight"):
    half, scales = np.zeros((64, 32), np.uint8), np.full((64, 2), 120, np.uint8)
    return lambda weight, random: {codes: half, scale: scales}


def one(name, array):
    return lambda weight, random: {name: array}


def floats(weight, random):
    return {"weight": weight}


E4M3 = np.zeros((64, 64), ml_dtypes.float8_e4m3fn)
FLOAT = np.ones((), np.float32)
GPTQ_PARTS, AWQ_PARTS, FP8_PARTS = gptq(4, 32), awq(32), fp8((32, 32))

#: Tensors of a layer, keys of config.json, other files; and the text for its layout, or a part of the refusal.
READ = {
    "compressed-tensors": (
        packed,
        {"quantization_config": COMPRESSED},
        {},
        "compressed-tensors pack-quantized, 4 bits",
    ),
    "compressed-tensors, nested": (packed, {"text_config": {"quantization_config": COMPRESSED}}, {}, "pack-quantized"),
    "compressed-tensors, defaults left out": (
        packed,
        {"quantization_config": grouped({"num_bits": 4, "group_size": 32})},
        {},
        "compressed-tensors pack-quantized, 4 bits",
    ),
    "compressed-tensors, int8 by a tensor, all left out": (
        lambda weight, random: {"weight": np.zeros((64, 64), np.int8), "weight_scale": np.ones(1, np.float32)},
        {"quantization_config": {**grouped({}), "format": "int-quantized"}},
        {},
        "compressed-tensors int-quantized, 8 bits",
    ),
    "compressed-tensors, blocks as a text": (
        lambda weight, random: {"weight": E4M3, "weight_scale": np.ones((2, 2), np.float32)},
        {
            "quantization_config": {
                **grouped({"type": "float", "strategy": "block", "block_structure": "32x32"}),
                "format": "float-quantized",
            }
        },
        {},
        "compressed-tensors, e4m3, blocks of 32 x 32",
    ),
    "compressed-tensors until 0.5": (packed, {"compression_config": COMPRESSED}, {}, "pack-quantized"),
    "compressed-tensors under both names": (
        packed,
        {"quantization_config": COMPRESSED, "compression_config": COMPRESSED},
        {},
        "pack-quantized",
    ),
    "gptq": (GPTQ_PARTS, {"quantization_config": GPTQ}, {}, "GPTQ, 4 bits, groups of 32"),
    "gptq, nested": (GPTQ_PARTS, {"text_config": {"quantization_config": GPTQ}}, {}, "GPTQ, 4 bits"),
    "gptq, in its old file": (GPTQ_PARTS, {}, {"quantize_config.json": {"bits": 4, "group_size": 32}}, "GPTQ, 4 bits"),
    "gptq, in both": (
        GPTQ_PARTS,
        {"quantization_config": GPTQ},
        {"quantize_config.json": {"bits": 4, "group_size": 32}},
        "GPTQ",
    ),
    "auto-round as gptq": (
        GPTQ_PARTS,
        {"quantization_config": {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}},
        {},
        "GPTQ",
    ),
    "awq": (AWQ_PARTS, {"quantization_config": AWQ}, {}, "AWQ, 4 bits, groups of 32"),
    "awq, in its old file": (
        AWQ_PARTS,
        {},
        {"quant_config.json": {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}},
        "AWQ",
    ),
    "fp8 in blocks": (FP8_PARTS, {"quantization_config": FP8}, {}, "fp8, e4m3, blocks of 32 x 32"),
    "fp8, one scale": (fp8(None), {"quantization_config": {"quant_method": "fp8"}}, {}, "fp8, e4m3, one scale"),
    "modelopt, beside": (nvfp4(), {}, {"hf_quant_config.json": MODELOPT}, "ModelOpt NVFP4"),
    "modelopt, in config.json too": (
        nvfp4(),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        {"hf_quant_config.json": MODELOPT},
        "ModelOpt NVFP4",
    ),
    "modelopt without its file": (
        nvfp4(),
        {"quantization_config": {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}},
        {},
        "ModelOpt NVFP4",
    ),
    "mlx": (mlx, {"quantization": MLX, "quantization_config": MLX}, {}, "MLX affine, 4 bits, groups of 32"),
    "mlx under one name": (mlx, {"quantization_config": MLX}, {}, "MLX affine"),
    "compressed-tensors of 2024": (
        packed,
        {"quantization_config": {**COMPRESSED, "quantization_status": "frozen", "global_compression_ratio": 1.2}},
        {},
        "pack-quantized",
    ),
    "with quantized caches": (
        packed,
        {"quantization_config": {**COMPRESSED, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
        {},
        "pack-quantized",
    ),
    "bitsandbytes": (bitsandbytes, {"quantization_config": BNB}, {}, "bitsandbytes nf4, runs of 64"),
    "bitsandbytes without a name": (bitsandbytes, {"quantization_config": {"load_in_4bit": True}}, {}, "nf4"),
    "bitsandbytes, 8 bits": (
        rows8,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {},
        "bitsandbytes int8",
    ),
    "awq for another kernel": (awq_rows, {"quantization_config": {**AWQ, "version": "gemv"}}, {}, "AWQ gemv"),
    **{
        f"modelopt {algorithm}": (
            parts,
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}},
            {},
            text,
        )
        for algorithm, parts, text in (
            ("W4A16_AWQ", pairs_of_rows("pre_quant_scale"), "int4, groups of 32, times pre_quant_scale"),
            ("W4A8_AWQ", pairs_of_rows(), "int4, groups of 32"),
            ("W8A8_SQ_PER_CHANNEL", pairs_of_rows("pre_quant_scale", bits=8), "int8, a scale for each row, times"),
            ("W8A16", pairs_of_rows(bits=8), "int8, a scale for each row"),
            ("mxfp4", mxfp4(), "e2m1, blocks of 1 x 32"),
        )
    },
    "fbgemm": (
        lambda weight, random: {"weight": E4M3, "weight_scale": np.ones((64, 1), np.float32), "input_scale_ub": FLOAT},
        {"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}},
        {},
        "fp8, e4m3, blocks of 1 x 64",
    ),
    "quark": (
        fp8(None, name="weight_scale"),
        {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}},
        {},
        "Quark, e4m3, one scale",
    ),
    "auto-round's mxfp4": (
        mxfp4(codes="weight_packed"),
        {"quantization_config": {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}},
        {},
        "AutoRound, e2m1, blocks of 1 x 32",
    ),
}
REFUSED = {
    **{
        f"{name} without settings": (parts, {}, {}, f"part of a quantized weight \\({title}")
        for name, parts, title in (
            ("compressed-tensors", packed, "compressed-tensors"),
            ("gptq", GPTQ_PARTS, "GPTQ or AWQ"),
            ("fp8", FP8_PARTS, "an unknown program|fp8"),
            ("modelopt", nvfp4(), "an unknown program|ModelOpt|compressed-tensors, ModelOpt"),
            ("mlx", mlx, "MLX|an unknown program"),
            ("bitsandbytes", bitsandbytes, "bitsandbytes|an unknown program"),
            ("float8 alone", one("weight", E4M3), "an unknown program"),
            ("int8 alone", one("weight", np.zeros((64, 64), np.int8)), "an unknown program"),
            ("hqq", one("W_q", np.zeros((64, 64), np.uint8)), "HQQ"),
            ("aqlm", one("codebooks", np.zeros((2, 4), np.float16)), "AQLM"),
            ("quanto", one("weight._data", np.zeros((64, 64), np.int8)), "quanto"),
            ("eetq", one("weight_scales", np.zeros(64, np.float16)), "EETQ"),
            ("a quantizer", one("weight_quantizer._amax", np.zeros(64, np.float32)), "ModelOpt before its export"),
        )
    },
    **{
        f"{method} by its name": (
            bitsandbytes,
            {"quantization_config": {"quant_method": method}},
            {},
            f"by {method}, which",
        )
        for method in (
            "hqq",
            "aqlm",
            "eetq",
            "quanto",
            "higgs",
            "vptq",
        )
    },
    "a method of the future": (
        packed,
        {"quantization_config": {"quant_method": "new"}},
        {},
        "by new, which qkit does not",
    ),
    "settings of a float model": (floats, {"quantization_config": GPTQ}, {}, "by gptq, and no tensor is part of"),
    "a file beside a float model": (
        floats,
        {},
        {"quantize_config.json": {"bits": 4}},
        "quantize_config.json says that",
    ),
    "settings of another program": (packed, {"quantization_config": GPTQ}, {}, "by gptq, and no tensor"),
    "two programs": (
        packed,
        {"quantization_config": COMPRESSED, "text_config": {"quantization_config": GPTQ}},
        {},
        "text_config has a quantization_config.*contradict",
    ),
    "two widths": (
        GPTQ_PARTS,
        {"quantization_config": GPTQ},
        {"quantize_config.json": {"bits": 8, "group_size": 32}},
        "contradict each other",
    ),
    "mlx twice, unlike": (
        mlx,
        {"quantization": MLX, "quantization_config": {**MLX, "bits": 8}},
        {},
        "contradict each other",
    ),
    "settings that are a text": (packed, {"quantization_config": "4bit"}, {}, "want an object"),
    "bitsandbytes of 2023": (
        lambda weight, random: {"weight": np.zeros((2048, 1), np.uint8), "weight.absmax": np.ones(64, np.float32)},
        {"quantization_config": BNB},
        {},
        "weight.quant_state is missing",
    ),
    "bitsandbytes for one kernel": (
        lambda weight, random: {**rows8(weight, random), "weight_format": np.ones((), np.uint8)},
        {"quantization_config": {"load_in_8bit": True}},
        {},
        "weight_format is not 0",
    ),
    "quark of integers": (
        fp8(None, name="weight_scale"),
        {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}}},
        {},
        'dtype is "int4": of Quark',
    ),
    "auto-round's mxint4": (
        mxfp4(codes="weight_packed"),
        {"quantization_config": {"quant_method": "auto-round", "bits": 4, "data_type": "mx_int"}},
        {},
        'data_type is "mx_int"',
    ),
    "a low rank beside the codes": (
        nvfp4(),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}},
        {},
        'quant_algo is "NVFP4_SVD"',
    ),
    "gptq in a marlin's order": (
        GPTQ_PARTS,
        {"quantization_config": {**GPTQ, "checkpoint_format": "marlin"}},
        {},
        "checkpoint_format is 'marlin'",
    ),
    "awq in the order of a kernel": (
        AWQ_PARTS,
        {"quantization_config": {**AWQ, "version": "gemv_fast"}},
        {},
        "version 'gemv_fast'",
    ),
    "gptq of other bits": (GPTQ_PARTS, {"quantization_config": {**GPTQ, "bits": 8}}, {}, "4 bits, and the settings 8"),
    "a method of modelopt": (
        nvfp4(),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "INT2"}},
        {},
        'quant_algo is "INT2"',
    ),
}


def halves(kind, *, name="weight", **more):
    """Codes of a short type of integer under any name, and what stands beside them."""
    return lambda weight, random: {name: random.integers(0, 100, (64, 32)).astype(kind), **more}


def with_scales(weight, random):
    return {"weight": weight, "scales": np.ones((64, 2), np.float16)}


def uneven(weight, random):
    return {**mlx(weight, random), "biases": np.ones((64, 3), np.float16)}


def rows_of_hqq(weight, random):
    words = random.integers(0, 256, (32, 64)).astype(np.uint8)
    return {"W_q": words, "scale": np.ones((128, 1), np.float16), "zero": np.ones((128, 1), np.float16)}


def two_kinds(weight, random):
    return {f"{path}.{name}": one for path, parts in (("a", GPTQ_PARTS(weight, random)), ("b", AWQ_PARTS(weight, random)))
            for name, one in parts.items()}  # fmt: skip


UNSAID = "config.json does not say of which kind"
REFUSED |= {
    "three levels down": (GPTQ_PARTS, {"thinker_config": {"text_config": {"quantization_config": GPTQ}}}, {}, UNSAID),
    "nested, of another width": (
        GPTQ_PARTS,
        {"quantization_config": GPTQ, "text_config": {"quantization_config": {**GPTQ, "bits": 8}}},
        {},
        "contradict each other",
    ),
    "settings that are null": (packed, {"quantization_config": None}, {}, UNSAID),
    "settings that are empty": (GPTQ_PARTS, {"quantization_config": {}}, {}, UNSAID),
    "settings in a list": (GPTQ_PARTS, {"quantization_config": [GPTQ]}, {}, "want an object"),
    "a method that is a number": (
        GPTQ_PARTS,
        {"quantization_config": {**GPTQ, "quant_method": 4}},
        {},
        "quantized by 4",
    ),
    "a width in quotes": (GPTQ_PARTS, {"quantization_config": {**GPTQ, "bits": "4"}}, {}, 'the settings "4"'),
    "one group said, two there": (
        GPTQ_PARTS,
        {"quantization_config": {**GPTQ, "group_size": -1}},
        {},
        "group_size is -1, and its 64 inputs have 2 scales",
    ),
    "one group said, two there, awq": (
        AWQ_PARTS,
        {"quantization_config": {**AWQ, "group_size": -1}},
        {},
        "group_size is -1, and its 64 inputs have 2 scales",
    ),
    "groups of nothing": (GPTQ_PARTS, {"quantization_config": {**GPTQ, "group_size": 0}}, {}, "group_size is 0"),
    "codes under a name of nobody's": (halves(np.uint8, name="weight_q4"), {}, {}, UNSAID),
    "codes of 16 bits": (halves(np.uint16, scale=FLOAT), {}, {}, UNSAID),
    "a stack of codes": (one("experts_q", np.ones((2, 64, 32), np.int8)), {}, {}, UNSAID),
    "scales beside floats": (with_scales, {}, {}, UNSAID),
    "bytes that are no float8": (
        halves(np.uint8, weight_scale=np.ones((64, 1), np.float32)),
        {"quantization_config": {"quant_method": "fp8"}},
        {},
        "its codes are uint8, and its scales float32",
    ),
    "mlx, biases of other groups": (uneven, {"quantization": MLX}, {}, r"biases (is|are).*\[64, 3\]"),
    **{
        f"mlx, {kind}": (
            mlx,
            {"quantization": MLX, "quantization_config": MLX, "model_type": kind},
            {},
            f"how mlx-lm renames the tensors of a '{kind}' is not known",
        )
        for kind in ("kimi_linear", "qwen2_vl", "gemma3")
    },
    "HQQ without settings": (rows_of_hqq, {}, {}, r"HQQ.*" + UNSAID),
    "HQQ": (rows_of_hqq, {"quantization_config": {"quant_method": "hqq"}}, {}, "quantized by hqq"),
    "two kinds of layers": (two_kinds, {"quantization_config": GPTQ}, {}, r"up_proj\.b: group_size is 32"),
    "no key of modelopt's": (
        nvfp4(),
        {},
        {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None}}},
        UNSAID,
    ),
    "all layers ignored, and one packed": (
        packed,
        {"quantization_config": {**COMPRESSED, "ignore": ["re:.*"]}},
        {},
        "ignores it by",
    ),
    "torchao without its parts": (
        floats,
        {"quantization_config": {"quant_method": "torchao"}},
        {},
        "no tensor is part of a weight quantized so",
    ),
}


def model(folder, parts, keys, files):
    """A layer of these parts, and float tensors around it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    tensors = {f"{PATH}.{name}": array for name, array in parts(weight, random).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ones((32, 64), ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))
    for name, table in files.items():
        (folder / name).write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("name", READ)
def test_a_configuration_is_read_right(name, tmp_path):
    *given, text = READ[name]
    folder = model(tmp_path / "m", *given)
    [group] = inspect_directory(folder).foreign
    assert group.paths == (PATH,)
    assert text in group.form
    assert any("weights are decoded" in note for note in make_plan(folder, qkit.recipe("int4-g64")).notes)
    found = read_model(folder)
    assert set(found.weights) | {one.removesuffix(".weight") for one in found.tensors} >= {PATH, "lm_head"}
    assert not json.dumps(found.config).count("quant")


@pytest.mark.parametrize("name", REFUSED)
def test_or_it_is_refused_by_name_by_every_reader(name, tmp_path):
    *given, message = REFUSED[name]
    folder = model(tmp_path / "m", *given)
    readers = [inspect_directory, read_model, lambda one: make_plan(one, qkit.recipe("int4-g64"))]
    for reader in readers:
        with pytest.raises(qkit.ArtifactError, match=message):
            reader(folder)


@pytest.mark.parametrize("name", [*READ, *REFUSED])
def test_none_of_them_is_loaded_as_a_float_model(name, tmp_path):
    pytest.importorskip("torch")
    folder = model(tmp_path / "m", *(READ | REFUSED)[name][:3])
    with pytest.raises(qkit.ArtifactError, match=r"quantized|quantization|contradict"):
        qkit.load(folder, backend="torchao")


def test_the_corpus_has_what_was_promised():
    assert len(READ) >= 15
    assert len(READ) + len(REFUSED) >= 40


# Directories that are no models

NO_MODELS = {
    "an adapter": (("adapter_config.json", "adapter_model.safetensors"), "is an adapter.*qkit merge BASE .* OUT"),
    "a GGUF file in a directory": (("llama-Q4_0.gguf",), "is a GGUF file: qkit import .*llama-Q4_0.gguf OUT"),
    "a diffusers model": (("model_index.json",), "is a diffusers model.*qkit.prepare"),
    "one part of it": (("config.json", "diffusion_pytorch_model.safetensors"), "is a diffusers model"),
    "an ONNX graph": (("model.onnx",), "an ONNX graph"),
    "pickles": (("config.json", "pytorch_model.bin"), "a pickle, which can run code.*save_pretrained"),
    "a configuration without its weights": (("config.json",), "has neither model.safetensors nor"),
}


@pytest.mark.parametrize("command", ["inspect", "import", "quantize", "diff", "export", "plan", "eval", "merge"])
@pytest.mark.parametrize("name", NO_MODELS)
def test_a_directory_that_is_no_model_gets_a_sentence(name, command, tmp_path):
    files, message = NO_MODELS[name]
    folder, out = tmp_path / "m", str(tmp_path / "out")
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    lines = {
        "inspect": [folder],
        "import": [folder, out],
        "quantize": [folder, out, "-r", "int4-g64"],
        "plan": [folder, "-r", "int4-g64"],
        "diff": [folder, folder],
        "export": [folder, out, "--to", "dense"],
        "eval": [folder, "--data", tmp_path / "text.txt", "--backend", "torchao"],
        "merge": [folder, folder, out, "--backend", "torchao"],
    }
    done = CliRunner().invoke(application, [command, *map(str, lines[command])])
    assert isinstance(done.exception, qkit.QkitError)
    assert search(message, str(done.exception)), done.exception
    assert not Path(out).exists()


def test_a_gguf_file_gets_the_same_sentence(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(qkit.QkitError, match=r"m.gguf is a GGUF file: qkit import .*m.gguf OUT makes"):
        inspect_directory(tmp_path / "m.gguf")
