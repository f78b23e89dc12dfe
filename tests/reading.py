"""Makes docs/reference/reading.md: the sources that qkit reads, comparisons, and sentences about directories that are no models.

python tests/reading.py writes the page. `tests/files/test_reading_page.py` holds it to the code.
"""

import sys
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from foreign import BF16, E8M0, awq, fp8, gptq, nvfp4, rewritten

from qkit.errors import QkitError
from qkit.exchange.import_model import read_model
from qkit.sources.decoded import DecodedArray
from qkit.sources.refused import REFUSED
from qkit.storage.read import read_folder

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "reading.md"
GOLDEN = Path(__file__).parent / "golden"
GPTQ = {"quant_method": "gptq", "group_size": 64, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
FORMULA = "the published formula, written anew in the test"

#: Files that other programs wrote, and the decoder that each was compared with.
FILES = {
    "others/gptq-": "GPTQModel 7.7 (`dequantize_weight`)",
    "others/auto-round-ct-": "compressed-tensors 0.20 (`decompress`)",
    "others/auto-round-fp8-block": "transformers 5.23 (fp8, dequantized)",
    "others/auto-round": "AutoRound 0.16 (its layers, or the decoder of its packing)",
    "others/awq-": "AutoAWQ 0.2.9 (`dequantize_gemm`, `unpack_awq`)",
    "others/bnb-": "bitsandbytes 0.50 (`dequantize_4bit`, `int8_vectorwise_dequant`)",
    "others/modelopt-int4": "ModelOpt 0.47 (its packing, and the weights of its simulation)",
    "others/modelopt-": "ModelOpt 0.47 (`quantization.qtensor`)",
    "others/ct-": "compressed-tensors 0.19 (`decompress`)",
    "llm-compressor/": "compressed-tensors 0.20 (`decompress`)",
}
#: Files that the tests write from the descriptions of layouts: encoder, settings, decoder.
WRITTEN = {
    **{
        f"GPTQ, {bits} bits, version {version}": (
            gptq(bits, 64, version=form),
            {**GPTQ, "bits": bits, "checkpoint_format": form},
            FORMULA,
        )
        for bits in (2, 3, 4, 8)
        for version, form in ((1, "gptq"), (2, "gptq_v2"))
    },
    "GPTQ, 4 bits, order of activations": (
        gptq(4, 64, order="permuted"),
        {**GPTQ, "bits": 4, "desc_act": True},
        FORMULA,
    ),
    "AWQ": (awq(64), AWQ, FORMULA),
    **{
        f"fp8, blocks of {block[0]} x {block[1]}, scales {kind}": (
            fp8(block, scale=scale),
            {"quant_method": "fp8", "weight_block_size": list(block)},
            "transformers 5.23 (`Fp8Dequantize`)",
        )
        for block in ((128, 128), (64, 32), (1, 128))
        for kind, scale in (("fp32", np.float32), ("bf16", BF16), ("UE8M0", E8M0))
    },
    "ModelOpt FP8": (fp8(None, name="weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}, FORMULA),
    "ModelOpt NVFP4": (nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, FORMULA),
}
NO_MODELS = {
    "a LoRA directory": ("adapter_config.json", "adapter_model.safetensors"),
    "a GGUF file": ("model.gguf",),
    "a diffusers directory": ("model_index.json",),
    "an ONNX directory": ("model.onnx",),
    "pickles only": ("config.json", "pytorch_model.bin"),
    "a configuration without its weights": ("config.json",),
}
TEXT = """# Reading models that are quantized already

`qkit inspect`, `import`, `export`, `diff`, `eval`, `compare`, `plan`, `quantize` and `train` take directories that other programs
quantized.
`qkit import DIR OUT` makes an artifact, with the same codes where a grid holds them, and with the decoded values of the other
weights. It counts these weights. `qkit quantize` decodes block by block, and says that the weights are then quantized twice.
`qkit compare` measures the values of such a model as the float model. `qkit.load`, `qkit verify` and
`qkit merge` take the artifact that `import` makes.

`qkit export --to mlx` and `--to gguf` write the same codes, or name the first layer that the target does not hold: MLX's affine
weights come back byte by byte; GGUF takes groups of 32 and more with scales that are float16 numbers (Q4_0, Q4_1, Q5_0, Q5_1,
Q8_0). Layers on read grids run from packed codes, by CUDA kernels on a GPU and by C kernels on a CPU.

Weights in fp8 with blocks of several rows have no grid. `import` writes their values, a float model, and `train` wants a recipe
for it: an adapter on such a base would have no codes to be merged into.

The settings may lie in `config.json` (`quantization_config`, `quantization`, the old `compression_config`, or nested as in
`text_config`), in `hf_quant_config.json`, `quantize_config.json` or `quant_config.json`. Settings and tensors have to agree. A
directory whose tensors look packed, and whose settings do not say how, is refused by name.

A grid named `stored` or `affine` is a read grid; see "Read grids" in [numerics.md](../../numerics.md). "Values" means that no
grid holds the codes: groups of several rows, or in the order of activations. qkit leaves out scales of inputs and
caches, and says so. Factors of inputs (`pre_quant_scale`) are multiplied into the weight, whose layer then takes its inputs as
they come.

## Sources

The last column counts the values that a test compared, bit for bit. ModelOpt decodes e2m1's -0 as 0, and a product with a unit
matrix, by which AutoRound's layers were asked, has no -0: there the sign of zero was not compared.
gpt-oss's experts (`*_blocks`, `*_scales`) equal those of
transformers' `convert_moe_packed_tensors` in the tests too.

`qkit import FILE.gguf OUT` reads GGUF files of Llama, Qwen 2 and 3, and Gemma 1 to 3. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4 and
NVFP4 stay codes; K-quants and all others become their values, equal to those of gguf 0.19. A tokenizer that lies beside the
file is copied. Otherwise it is rebuilt from the file's keys (`llama`, and `gpt2` with splits that qkit knows), and transformers
opens it. `inspect`, `verify`, `eval`, `compare`, `plan`, `quantize`, `diff` and `export` take the file itself, and decode or
import it in a temporary directory. `train` wants the directory of `import`, from which a run can go on later. Mixtures of
experts are refused.

Of mlx-lm's models, those with transformers' names are read, 42 types. DeepSeek's `kv_b_proj`, which mlx-lm splits by heads and
quantizes along another axis, is read as its values. Of a model of pictures and text mlx-lm writes the language model, which is
read alone. Where mlx-lm gave the projections of experts several widths, an engine opens all on the widest grid: the same values.
Others are refused by their type before any work: renamed families, and models with towers of pictures.

Of torchao's tensors, those with a byte for each code are read (`Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`,
`Float8WeightOnlyConfig`), from safetensors. `tests/files/test_torchao_source.py` compares all 294,912 values of six kinds, in
three types, with torchao's own.

| source | read as | compared with | values |
|---|---|---|---|
"""


def rows():
    """Source, decoder and snapshot of each row of the table."""
    for folder in sorted((*(GOLDEN / "others").iterdir(), *(GOLDEN / "llm-compressor").iterdir())):
        name = f"{folder.parent.name}/{folder.name}"
        if folder.name != "float":
            owner = next(text for start, text in FILES.items() if name.startswith(start))
            yield f"`tests/golden/{name}`", owner, read_model(folder)
    with TemporaryDirectory() as place:
        for number, (name, (encode, settings, owner)) in enumerate(WRITTEN.items()):
            dtype = "float16" if name == "AWQ" else "bfloat16"
            yield name, owner, read_model(rewritten(Path(place) / str(number), encode, settings, dtype=dtype))


def page():
    """The text of the page."""
    out = [TEXT]
    for name, owner, model in rows():
        values = [array for array in model.tensors.values() if isinstance(array, DecodedArray)]
        grids = sorted({str(weight.rule.weight) for weight in model.weights.values()}) + ["values"] * bool(values)
        count = sum(prod(one.shape) for one in (*values, *model.weights.values()))
        out.append(f"| {name} | {', '.join(grids)} | {owner} | {count:,} |\n")
    out.append("\n## Refused by name\n\n| `quant_method` | the sentence |\n|---|---|\n")
    out += [f"| {name} | {text} |\n" for name, text in REFUSED.items()]
    out.append("\n## Directories that are no models\n\n| directory | the sentence |\n|---|---|\n")
    with TemporaryDirectory() as place:
        for number, (name, files) in enumerate(NO_MODELS.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            for file in files:
                (folder / file).touch()
            try:
                read_folder(folder)
            except QkitError as error:
                out.append(f"| {name} | {str(error).replace(str(folder), 'DIR')} |\n")
    return "".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
