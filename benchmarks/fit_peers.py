"""Fits a model with another program, in that program's own environment, and writes the values of its weights. For fit.py.

Every program gets the same windows of tokens and the bits, group and scales of the recipe nearest to its own: symmetric groups of
32, MXFP4 and NVFP4. mlx-lm has affine groups, with a bias more. The output head stays in float.

Usage: PYTHON_OF_ENVIRONMENT -P benchmarks/fit_peers.py PEER MODEL WINDOWS.npy RECIPE OUT.safetensors
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

BITS = {"int4-g32": 4, "int3-g32": 3, "int2-g32": 2}
PRESETS = {"mxfp4-a16": "MXFP4A16", "nvfp4-a16": "NVFP4A16"}
BATCH = 8  #: windows at once
ITERATIONS = 200  #: of AutoRound
Values = dict[str, Any]


def llmcompressor_gptq(model: Path, windows: np.ndarray, recipe: str) -> Values:
    """llm-compressor's GPTQ."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _llmcompressor(model, windows, GPTQModifier(**_scheme(recipe)))


def llmcompressor_rtn(model: Path, windows: np.ndarray, recipe: str) -> Values:
    """llm-compressor's rounding to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return _llmcompressor(model, windows, QuantizationModifier(**_scheme(recipe)))


def _scheme(recipe: str) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if recipe in PRESETS:
        return {"targets": ["Linear"], "scheme": PRESETS[recipe], "ignore": ["lm_head"]}
    weights = QuantizationArgs(num_bits=BITS[recipe], type="int", symmetric=True, strategy="group", group_size=32)
    return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}


def _llmcompressor(model: Path, windows: np.ndarray, modifier: Any) -> Values:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": torch.tensor(row).long(), "attention_mask": torch.ones(len(row)).long()} for row in windows]
    words = WordLevel({str(number): number for number in range(found.config.vocab_size)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))  # it wants one, and has nothing to do for it
    data = DataLoader(rows, batch_size=BATCH)
    oneshot(model=found, dataset=data, recipe=modifier, processor=tokenizer, num_calibration_samples=len(rows))
    values = {}
    for path, module in found.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        more = {"global_scale": module.weight_global_scale} if hasattr(module, "weight_global_scale") else {}
        zero = getattr(module, "weight_zero_point", None)
        with torch.no_grad():
            values[path] = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights, **more)
    return values


def autoround(model: Path, windows: np.ndarray, recipe: str) -> Values:
    """AutoRound with 200 iterations."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": torch.tensor(row)[None].long()} for row in windows]
    how: dict[str, Any] = {"scheme": PRESETS[recipe].removesuffix("A16")} if recipe in PRESETS else {}
    if recipe in BITS:
        how = {"scheme": {"bits": BITS[recipe], "group_size": 32, "sym": True, "data_type": "int"}}
    made = AutoRound(
        found,
        tokenizer=_NoTokenizer(),
        dataset=rows,
        iters=ITERATIONS,
        nsamples=len(rows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,
        **how,
    )
    tuned, _ = made.quantize()
    return {path: module.weight for path, module in tuned.named_modules() if _is_inner(path, module)}


class _NoTokenizer:
    """The tokens are there already."""

    def __getattr__(self, name: str) -> Any:
        return None


def _is_inner(path: str, module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and path != "lm_head" and not path.endswith("embed_tokens")


def mlx_gptq(model: Path, windows: np.ndarray, recipe: str) -> Values:
    """mlx-lm's GPTQ, on its affine grid."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load_model

    found, _ = load_model(model)
    made, _ = gptq_quantize(found, mx.array(windows), BITS[recipe], 32, 8, 32)
    values = {}
    for path, module in tree_flatten(made.leaf_modules(), is_leaf=lambda one: hasattr(one, "parameters")):
        if hasattr(module, "scales") and path.startswith("model.layers."):
            w = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            values[path] = np.array(w.astype(mx.float32))
    return values


def gptqmodel(model: Path, windows: np.ndarray, recipe: str) -> Values:
    """GPTQModel's GPTQ."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to start with one, as on machines of two cores
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({str(number): number for number in range(256)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="0", pad_token="0")
    whole = {"offload_to_disk": False, "format": "gptq_v2"}  # in memory, and zero points as they are, not less one
    how = QuantizeConfig(bits=BITS[recipe], group_size=32, sym=True, desc_act=False, **whole)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    with TemporaryDirectory() as place:
        folder = shutil.copytree(model, Path(place) / "model")
        tokenizer.save_pretrained(folder)  # it looks for one there
        found = GPTQModel.load(str(folder), how, device="cpu", dtype=torch.float32)
        found.quantize(rows, batch_size=BATCH, tokenizer=tokenizer)
    return {
        path: module.dequantize_weight().T for path, module in found.model.named_modules() if hasattr(module, "qweight")
    }


PEERS: dict[str, Callable[[Path, np.ndarray, str], Values]] = {
    "llm-compressor RTN": llmcompressor_rtn,
    "llm-compressor GPTQ": llmcompressor_gptq,
    "AutoRound 200": autoround,
    "mlx-lm gptq": mlx_gptq,
    "GPTQModel": gptqmodel,
}


def main() -> int:
    """Writes the weights, and prints the CPU seconds as JSON."""
    from safetensors.numpy import save_file

    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    peer, recipe = sys.argv[1], sys.argv[4]
    model, windows, out = (Path(sys.argv[place]).resolve() for place in (2, 3, 5))
    with TemporaryDirectory() as place, chdir(place):  # GPTQModel writes its log where it runs
        begin = time.process_time()
        found = PEERS[peer](model, np.load(windows), recipe)
        seconds = time.process_time() - begin
    arrays = {
        f"{path}.weight": np.ascontiguousarray(one if isinstance(one, np.ndarray) else one.detach().float().numpy())
        for path, one in found.items()
    }
    save_file(arrays, out)
    print(json.dumps({"CPU seconds": seconds, "layers": len(arrays)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
