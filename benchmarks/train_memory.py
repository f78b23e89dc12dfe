"""The peak memory of QLoRA beside the estimate of `qkit plan --train`: the shape of Llama 3 8B, with few layers, on one GPU.

Two depths give the memory of a layer, and so that of all 32. Weights are random, which changes no size.
"""

import argparse
import gc
import json
import struct
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # -P leaves it out, since kernels.py here would hide a package of that name

import numpy as np
import torch
from measure import Report
from transformers import LlamaConfig, LlamaForCausalLM

import qkit
from qkit.engines.trainer import TrainerOptions
from qkit.streaming.plan import make_plan
from qkit.training.memory import training_memory

WHOLE = 32
SHAPES = {
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}  # fmt: skip


def estimate(config, recipe, arguments):
    """The bytes that the plan of a checkpoint of this shape tells; its file has a header, and no weights."""
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, one in state.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(one.shape),
            "data_offsets": [end, end + 2 * one.numel()],
        }
        end += 2 * one.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        with (Path(folder) / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        options = {
            "batch": arguments.batch, "length": arguments.length, "rank": arguments.rank, "dtype": "bfloat16",
            "device": arguments.device, "recompute": True,
        }  # fmt: skip
        table = json.loads((Path(folder) / "config.json").read_text())
        return training_memory(make_plan(Path(folder), qkit.recipe(recipe)), table, **options)[-1].total


def peak(config, recipe, arguments):
    """The most bytes that tensors take in three steps."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = qkit.adapt(qkit.convert(model, recipe), qkit.Adapter(rank=arguments.rank))
    options = TrainerOptions(weight_decay=0.0, seed=0, recompute=True)
    trainer = qkit.backend("torchao").trainer(model, options)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(0, config.vocab_size, (arguments.batch, arguments.length + 1))
        trainer.step([drawn.astype(np.int32)], learning_rate=1e-4)
    return torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None


def main():
    """Prints one line of JSON for each recipe and depth, and one for all 32 layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--recipes", nargs="+", default=["int4-g32-all", "int4-g32"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = {name: getattr(arguments, name) for name in ("shape", "batch", "length", "rank")}
    report = Report(arguments.out, device=arguments.device, packages=["transformers"], about=about)
    for recipe in arguments.recipes:
        found = {}
        for layers in (*arguments.layers, WHOLE):
            config = LlamaConfig(
                num_hidden_layers=layers, tie_word_embeddings=False, max_position_embeddings=arguments.length,
                dtype="bfloat16", **SHAPES[arguments.shape],
            )  # fmt: skip
            if layers == WHOLE:
                few, more = arguments.layers
                known = all(found.values())
                found[layers] = (
                    found[few] + (found[more] - found[few]) / (more - few) * (layers - few) if known else None
                )
            else:
                found[layers] = peak(config, recipe, arguments)
            gb = {
                "peak_gb": None if found[layers] is None else round(found[layers] / 1e9, 3),
                "estimate_gb": round(estimate(config, recipe, arguments) / 1e9, 3),
            }
            report.add({"recipe": recipe, "layers": layers, "extrapolated": layers == WHOLE, **gb})
    report.finish()


if __name__ == "__main__":
    main()
