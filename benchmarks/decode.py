"""One token through a Llama on CUDA: bfloat16, qkit's converted int4, and torchao's own Int4WeightOnlyConfig, in one run.

Each forward is captured in a CUDA graph, so that launches do not count; the three take turns; medians of the repeats with
their spread, and the bytes of the weights.

Usage: python benchmarks/decode.py [--layers N] [--out FILE.json]
"""

import argparse
import copy
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from measure import Report, in_turn, relative

import qkit

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}


def linear_bytes(model: torch.nn.Module) -> int:
    """Stored bytes of the weights of the decoder's linear layers."""
    total = 0
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if "proj" in name:
            held = getattr(weight, "tensor_data_names", None)
            parts = [getattr(weight, part) for part in held] if held else [weight]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def captured(model: torch.nn.Module) -> torch.cuda.CUDAGraph:
    """The forward of one token as a CUDA graph."""
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(token, use_cache=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model(token, use_cache=False)
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int = 50) -> float:
    """Device time of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    engine = qkit.backend("torchao").on("cuda")
    with torch.device("cuda"):
        plain = engine.build({**CONFIG, "num_hidden_layers": given.layers})
    models = {"bfloat16": plain, "qkit int4-g128": qkit.convert(copy.deepcopy(plain), "int4-g128")}
    theirs = copy.deepcopy(plain)
    head, theirs.lm_head = theirs.lm_head, None
    quantize_(theirs, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    theirs.lm_head = head
    models["torchao Int4WeightOnlyConfig g128"] = theirs
    print(qkit.coverage(models["qkit int4-g128"]).rows[1], file=sys.stderr)

    graphs = {name: captured(model) for name, model in models.items()}
    times = in_turn({name: partial(milliseconds, graph) for name, graph in graphs.items()}, 9)
    base, base_bytes = statistics.median(times["bfloat16"]), linear_bytes(plain)
    report = Report(given.out, device="cuda", about={"layers": given.layers})
    for name, model in models.items():
        row = {"model": name, "ms": relative(times[name])}
        row["time / bfloat16"] = round(statistics.median(times[name]) / base, 3)
        report.add(row | {"bytes / bfloat16": round(linear_bytes(model) / base_bytes, 4)})
    report.finish()


if __name__ == "__main__":
    main()
