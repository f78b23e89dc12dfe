"""Makes directories in `others/` as `other_programs` does: those of ModelOpt, AutoAWQ and bitsandbytes, and their own decoders.

python tests/golden/more_programs.py modelopt | autoawq | bitsandbytes, each where these packages are installed.
Made with nvidia-modelopt 0.47.0, autoawq 0.2.9 and bitsandbytes 0.50.2 on a CPU.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from other_programs import WORK, finish, float_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

#: By name of the directory: ModelOpt's configuration, and the length of blocks where it is another than its own.
MODELOPT = {
    "modelopt-fp8": ("FP8_DEFAULT_CFG", None),
    "modelopt-fp8-rows": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", None),
    "modelopt-fp8-blocks": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 32),
    "modelopt-nvfp4": ("NVFP4_DEFAULT_CFG", None),
    "modelopt-w4a16-nvfp4": ("W4A16_NVFP4_CFG", None),
    "modelopt-w4a8-nvfp4": ("W4A8_NVFP4_FP8_CFG", None),
    "modelopt-mxfp4": ("MXFP4_DEFAULT_CFG", None),
    "modelopt-mxfp8": ("MXFP8_DEFAULT_CFG", None),
    "modelopt-int8": ("INT8_WEIGHT_ONLY_CFG", None),
    "modelopt-int8-smooth": ("INT8_SMOOTHQUANT_CFG", None),
    "modelopt-int4": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 32),
    "modelopt-int4-awq": ("INT4_AWQ_CFG", 32),
}


def modelopt():
    """ModelOpt's unified checkpoints, decoded by the tensors of `modelopt.torch.quantization.qtensor`."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    for name, (config, size) in MODELOPT.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        model = AutoModelForCausalLM.from_pretrained(float_model(torch.bfloat16), dtype=torch.bfloat16)
        wanted = resized(copy.deepcopy(getattr(mtq, config)), size)
        rows = torch.randint(0, 26, (4, 32), generator=torch.Generator().manual_seed(2))
        mtq.quantize(model, wanted, lambda model, rows=rows: model(rows))
        simulated = {path: seen(layer) for path, layer in model.named_modules() if path.endswith("_proj")}
        export_hf_checkpoint(model, export_dir=WORK / name)
        tensors = load_file(WORK / name / "model.safetensors")
        values = {f"{path}.weight": decoded(tensors, path, size).to(torch.bfloat16) for path in simulated}
        for path, value in values.items():  # the export gives some layers common scales, so values differ a little
            near = simulated[path.removesuffix(".weight")]
            assert (value.float() - near).norm() < 0.2 * near.norm(), path
        finish(WORK / name, values)
        shutil.copy(WORK / name / "hf_quant_config.json", Path(__file__).parent / "others" / name)


def seen(layer):
    """The weight that a layer computes with, in ModelOpt's simulation, for inputs as they come.

    ModelOpt simulates no scales of 8 bits on a CPU: then the weight itself.
    """
    if (layer.weight_quantizer.block_sizes or {}).get("scale_bits"):
        return layer.weight.detach().float()
    weight = layer.weight_quantizer(layer.weight.detach()).float()
    return weight * getattr(layer.input_quantizer, "_pre_quant_scale", torch.ones(1)).float()


def resized(config, size):
    """`config` with blocks of `size`."""
    if size:
        for entry in config["quant_cfg"] if isinstance(config["quant_cfg"], list) else config["quant_cfg"].values():
            table = entry.get("cfg", entry) if isinstance(entry, dict) else {}
            for one in table if isinstance(table, list) else [table]:
                if one and one.get("block_sizes"):
                    one["block_sizes"] = {k: size if k in (-1, -2) else v for k, v in one["block_sizes"].items()}
    return config


def decoded(tensors, path, size):
    """The weight at `path`, float32, by ModelOpt's own tensors; AWQ's int4 by its own packing, which has no decoder on a CPU."""
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    weight, scale = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
    shape, factor = torch.Size((weight.shape[0], 64)), tensors.get(f"{path}.weight_scale_2")
    if weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        value = MXFP8QTensor(shape, torch.float32, weight).dequantize(scale=scale)
    elif weight.dtype == torch.float8_e4m3fn:
        blocks = {-1: size, -2: size} if scale.dim() == 4 else None
        wide = scale[:, 0, :, 0] if blocks else scale[:, None] if scale.dim() == 1 else scale
        value = FP8QTensor(shape, torch.float32, weight).dequantize(scale=wide, block_sizes=blocks)
    elif weight.dtype == torch.int8:
        value = INT8QTensor(shape, torch.float32, weight).dequantize(scale=scale[:, None])
    elif scale.dtype == torch.uint8:
        value = MXFP4QTensor(shape, torch.float32, weight).dequantize(scale=scale, block_sizes={-1: 32})
    elif factor is not None:
        width = 64 // scale.shape[-1]
        value = NVFP4QTensor(shape, torch.float32, weight).dequantize(
            scale=scale, double_scale=factor, block_sizes={-1: width}
        )
    else:
        halves = torch.stack((weight & 15, weight >> 4), 1).reshape(-1, 64).to(torch.int8)
        wide = scale.float().repeat_interleave(64 // scale.shape[-1], 1)
        value = torch.where(halves > 7, halves - 16, halves).float() * wide
        assert torch.equal(pack_int4_in_uint8(value, scale.float(), 64 // scale.shape[-1]), weight)
    return value * tensors.get(f"{path}.pre_quant_scale", torch.ones(64)).float()


def autoawq():
    """AutoAWQ's layers of both versions in a Llama, decoded by its `dequantize_gemm`, or asked by its packing."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm, unpack_awq

    for name, layer_of in (("awq-gemm", WQLinear_GEMM), ("awq-gemv", WQLinear_GEMV)):
        source, random = float_model(torch.float16), torch.Generator().manual_seed(3)
        tensors, values = load_file(source / "model.safetensors"), {}
        for path in sorted(one.removesuffix(".weight") for one in tensors if one.endswith("_proj.weight")):
            weight = tensors.pop(f"{path}.weight")
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
            runs = weight.reshape(len(weight), -1, 32)
            scales = ((runs.amax(-1) - runs.amin(-1)) / 15).clamp(min=1e-4)
            zeros = torch.randint(4, 12, scales.shape, generator=random).to(torch.float16)
            wide, shift = scales.repeat_interleave(32, 1), zeros.repeat_interleave(32, 1)
            linear.weight.data = (((weight / wide).round() + shift).clamp(0, 15) - shift) * wide
            plain = layer_of is WQLinear_GEMV
            mine = layer_of.from_linear(
                linear,
                4,
                32,
                scales=scales if plain else scales.T.contiguous(),
                zeros=zeros if plain else zeros.T.contiguous(),
            )
            tensors |= {f"{path}.{part}": one.contiguous() for part, one in mine.state_dict().items()}
            if plain:  # its kernel has no CPU form: its own packing of plain order, undone by its own unpacking
                codes, offsets = unpack_awq(mine.qweight, mine.qzeros, 4)
                codes, offsets = (codes & 15).reshape(len(weight), -1), (offsets & 15).reshape(len(weight), -1)
                number = (codes - offsets[:, : scales.shape[1]].repeat_interleave(32, 1)) * wide
            else:
                number = dequantize_gemm(mine.qweight, mine.qzeros, mine.scales, 4, 32).T
            values[f"{path}.weight"] = number.to(torch.float16)
        settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": name[4:]}
        write(name, source, tensors, settings, values)


def write(name, source, tensors, settings, values):
    """A directory of these tensors and settings."""
    folder = WORK / name
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2) + "\n")
    finish(folder, values)


def bitsandbytes():
    """bitsandbytes by transformers' own `save_pretrained`, decoded by its functions."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    for name, given in (
        ("bnb-nf4", {**four, "bnb_4bit_quant_type": "nf4"}),
        ("bnb-nf4-double", {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("bnb-fp4", {**four, "bnb_4bit_quant_type": "fp4"}),
        ("bnb-int8", {"load_in_8bit": True}),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            float_model(torch.bfloat16),
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(**given),
        )
        model.save_pretrained(WORK / name)
        tensors, values = load_file(WORK / name / "model.safetensors"), {}
        for path in sorted(one.removesuffix(".weight") for one in tensors if one.endswith("_proj.weight")):
            if name == "bnb-int8":
                value = int8_vectorwise_dequant(tensors[f"{path}.weight"], tensors[f"{path}.SCB"])
            else:
                start = f"{path}.weight."
                state = {one.removeprefix(start): x for one, x in tensors.items() if one.startswith(start)}
                value = dequantize_4bit(tensors[f"{path}.weight"], QuantState.from_dict(state, torch.device("cpu")))
            values[f"{path}.weight"] = value.to(torch.bfloat16)
        finish(WORK / name, values)


if __name__ == "__main__":
    {"modelopt": modelopt, "autoawq": autoawq, "bitsandbytes": bitsandbytes}[sys.argv[1]]()
