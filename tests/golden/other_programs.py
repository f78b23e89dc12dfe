"""Makes the directories in `others/`: a tiny Llama, as other programs quantize it, and the SHA-256 of their decoded values.

Each program needs an environment of its own: python tests/golden/other_programs.py gptqmodel | auto-round | llm-compressor.
Made with gptqmodel 7.7.0, auto-round 0.16.1 and llmcompressor 0.14.0.1 on a CPU.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent / "others"
WORK = Path(tempfile.gettempdir()) / "golden-others"
KEPT = ("config.json", "model.safetensors", "values.json", "quantize_config.json")
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def float_model(dtype):
    """The directory of the float model, with a tokenizer of one token for each letter."""
    folder = WORK / str(dtype).rpartition(".")[2]
    if not folder.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).save_pretrained(folder)
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(32)}, unk_token="a"))
        letters.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="a", pad_token="a").save_pretrained(folder)
    return folder


def texts(count=16, length=32):
    """Random words of one letter."""
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 26, (count, length), generator=random)
    return [" ".join(chr(97 + int(i)) for i in row) for row in rows]


def finish(folder, values, name=None):
    """Keeps the files that tests read, and the decoded values."""
    bits = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in values.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(bits.items())}
    (folder / "values.json").write_text(json.dumps(digests, indent=1) + "\n")
    target = OUT / (name or folder.name)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in KEPT:
        if (folder / name).exists():
            shutil.copy(folder / name, target / name)


def gptqmodel():
    """GPTQ of 2, 3, 4 and 8 bits, in both versions, with and without the order of activations, symmetric and not."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    for name, bits, version, desc_act, sym in (
        ("gptq-4", 4, "gptq", False, True),
        ("gptq-4-order", 4, "gptq", True, True),
        ("gptq-4-v2", 4, "gptq_v2", False, False),
        ("gptq-3", 3, "gptq", False, True),
        ("gptq-2-v2", 2, "gptq_v2", False, False),
        ("gptq-8", 8, "gptq", False, True),
    ):
        config = QuantizeConfig(bits=bits, group_size=32, desc_act=desc_act, sym=sym, format=version)
        model = GPTQModel.load(str(float_model(torch.float16)), config)
        model.quantize(texts(), batch_size=1, backend=BACKEND.TORCH)
        model.save(str(WORK / name))
        again = GPTQModel.load(str(WORK / name), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        values = {
            f"{path}.weight": layer.dequantize_weight().T.to(torch.float16)
            for path, layer in again.model.named_modules()
            if hasattr(layer, "dequantize_weight")
        }
        finish(WORK / name, values)


def auto_round():
    """AutoRound in the layouts of GPTQ and AWQ, its own, fp8's and compressed-tensors'."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    only = sys.argv[2:]
    for name, scheme, layout, dtype in (
        ("auto-round-gptq", "W4A16", "auto_gptq", torch.float16),
        ("auto-round-awq", "W4A16", "auto_awq", torch.float16),
        ("auto-round", "W4A16", "auto_round", torch.float16),
        ("auto-round-own-awq", "W4A16", "auto_round:auto_awq", torch.float16),
        ("auto-round-2", "W2A16", "auto_round", torch.float16),
        ("auto-round-3", "W3A16", "auto_round", torch.float16),
        ("auto-round-8", "W8A16", "auto_round", torch.float16),
        ("auto-round-mixed", "W4A16_MIXED", "auto_round", torch.float16),
        ("auto-round-mxfp4", "MXFP4", "auto_round", torch.bfloat16),
        ("auto-round-mxfp8", "MXFP8", "auto_round", torch.bfloat16),
        ("auto-round-nvfp4", "NVFP4", "auto_round", torch.bfloat16),
        ("auto-round-fp8", "FP8_STATIC", "auto_round", torch.bfloat16),
        ("auto-round-ct-fp8", "FP8_STATIC", "llm_compressor", torch.bfloat16),
        ("auto-round-ct-mxfp4", "MXFP4", "llm_compressor", torch.bfloat16),
        ("auto-round-ct-nvfp4", "NVFP4", "llm_compressor", torch.bfloat16),
        ("auto-round-ct-int4", "W4A16", "llm_compressor", torch.bfloat16),
        ("auto-round-fp8-block", "FP8_BLOCK", "fp8", torch.bfloat16),
    ):
        if only and name not in only:
            continue
        source = float_model(dtype)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        given = {"group_size": 32, "sym": layout != "auto_awq"} if scheme.startswith("W") else {}
        tokenizer = AutoTokenizer.from_pretrained(source)
        rounder = AutoRound(
            model,
            tokenizer,
            scheme=scheme,
            iters=0,
            disable_opt_rtn=True,
            dataset=texts(),
            seqlen=16,
            nsamples=4,
            **given,
        )
        shutil.rmtree(WORK / name, ignore_errors=True)
        rounder.quantize_and_save(str(WORK / name), format=layout)
        folder = next(one.parent for one in (WORK / name).rglob("model.safetensors"))
        finish(folder, as_loaded(folder, dtype), name)


def as_loaded(folder, dtype):
    """The weights of the layers that transformers and AutoRound make of `folder`: decoded by the layers, or their answers to
    the rows of a unit matrix.
    """
    file = folder / "config.json"
    text = file.read_text()
    if "awq" in text:  # its layers want other kernels than a CPU's; its packing undoes itself
        from auto_round.export.export_to_awq.utils import dequantize_gemm
        from safetensors.torch import load_file

        x = load_file(folder / "model.safetensors")
        paths = [name.removesuffix(".qweight") for name in x if name.endswith(".qweight")]
        parts = {path: [x[f"{path}.{one}"] for one in ("qweight", "qzeros", "scales")] for path in paths}
        return {f"{path}.weight": dequantize_gemm(*mine, 4, 32).T.contiguous() for path, mine in parts.items()}
    config = json.loads(text)
    settings = config["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        return decompressed(folder, settings, dtype)
    if (method := settings["quant_method"]) in ("gptq", "awq"):  # AutoRound's own layers open them under its own name
        settings |= {"quant_method": "auto-round", "packing_format": f"auto_round:auto_{method}"}
    if method == "fp8":
        settings["dequantize"] = True
    file.write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    file.write_text(text)
    values = {}
    for path, layer in model.named_modules():
        if not path.endswith("_proj"):
            continue
        if hasattr(layer, "dequant_weight_online"):
            values[f"{path}.weight"] = layer.dequant_weight_online().reshape(layer.out_features, -1).to(dtype)
        elif type(layer) is torch.nn.Linear:
            values[f"{path}.weight"] = layer.weight.detach().to(dtype)
        else:
            with torch.no_grad():
                values[f"{path}.weight"] = layer(torch.eye(64, dtype=dtype)).T.contiguous()
    return values


def decompressed(folder, settings, dtype):
    """The weights of a directory of one group in compressed-tensors' layouts, by its own decoder."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    given = QuantizationConfig.model_validate({name: one for name, one in settings.items() if name != "provider"})
    [group] = given.config_groups.values()
    decoder, values = BaseCompressor.get_value_from_registry(group.format or given.format), {}
    for path in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        mine = {name.removeprefix(f"{path}."): one for name, one in tensors.items() if name.startswith(f"{path}.")}
        values[f"{path}.weight"] = decoder.decompress(mine, group)["weight"].to(dtype)
    return values


def llm_compressor():
    """llm-compressor with GPTQ's orders, float16 scales, zero points by channel, blocks of fp8, and NVFP4."""
    from compressed_tensors.compressors import BaseCompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    def weights(**changes):
        given = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **changes}
        return {"group_0": {"targets": ["Linear"], "weights": given}}

    for name, dtype, modifier in (
        (
            "ct-actorder-static",
            torch.bfloat16,
            GPTQModifier(config_groups=weights(actorder="static"), ignore=["lm_head"]),
        ),
        (
            "ct-actorder-weight",
            torch.bfloat16,
            GPTQModifier(config_groups=weights(actorder="weight"), ignore=["lm_head"]),
        ),
        ("ct-w4a16-fp16", torch.float16, QuantizationModifier(config_groups=weights(), ignore=["lm_head"])),
        (
            "ct-w4a16-fp32",
            torch.float32,
            QuantizationModifier(config_groups=weights(symmetric=False), ignore=["lm_head"]),
        ),
        (
            "ct-channel-asym",
            torch.float16,
            QuantizationModifier(
                config_groups=weights(num_bits=8, symmetric=False, strategy="channel", group_size=None),
                ignore=["lm_head"],
            ),
        ),
        (
            "ct-fp8-block",
            torch.bfloat16,
            QuantizationModifier(targets="Linear", scheme="FP8_BLOCK", ignore=["lm_head"]),
        ),
        ("ct-fp8", torch.bfloat16, QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"])),
        ("ct-nvfp4", torch.bfloat16, QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"])),
    ):
        source = float_model(dtype)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
        rows = [tokenizer(text, return_tensors=None) for text in texts()]
        data = Dataset.from_list(
            [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]
        )
        oneshot(model=model, dataset=data, recipe=modifier, num_calibration_samples=len(rows), max_seq_length=32)
        model.save_pretrained(WORK / name, save_compressed=True)
        tensors, values = load_file(WORK / name / "model.safetensors"), {}
        schemes = {
            path: layer.quantization_scheme
            for path, layer in model.named_modules()
            if hasattr(layer, "quantization_scheme")
        }
        for path, scheme in schemes.items():
            mine = {full.removeprefix(f"{path}."): x for full, x in tensors.items() if full.startswith(f"{path}.")}
            if f"{path}.weight_scale" in tensors:
                decoder = BaseCompressor.get_value_from_registry(scheme.format)
                values[f"{path}.weight"] = decoder.decompress(mine, scheme)["weight"].to(dtype)
        finish(WORK / name, values)


if __name__ == "__main__":
    {"gptqmodel": gptqmodel, "auto-round": auto_round, "llm-compressor": llm_compressor}[sys.argv[1]]()
