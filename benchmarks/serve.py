"""Serving a Llama of transformers on CUDA: one token, a prefill and memory of every recipe over bfloat16, in one run.

Weights are random, and drawn on the device. One token and the prefill are forwards in CUDA graphs, so that launches do not
count; the float and the converted model take turns. One token is timed in three ways: `eager`, as transformers computes it;
`compiled`, with `torch.compile` on its layers; `linears`, the linear layers of the model alone, one after the other. `generate`
is by the clock, launches included. Torchao's own int4 and fp8 stand beside. `bar` is the most that one token may take; `within`
says for each way whether it does, and whether prefill and memory keep their bars.

Usage: python benchmarks/serve.py [--device cuda] [--size 1b 8b] [--layers N] [--recipe NAME ...] [--out FILE.json]
       python benchmarks/serve.py --device cpu [--threads 1 2] [--layers N] [--recipe NAME ...] [--out FILE.json]
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from measure import Report, in_turn
from torch import nn

import qkit

PROMPT = 2048  #: tokens of the prefill
TOKENS = 64  #: that `generate` makes
PREFILL, MEMORY = 1.12, 1.03  #: bars: over bfloat16, and over the bytes that the grids need
SIZES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
}
CONFIG = {"model_type": "llama", "vocab_size": 32000, "num_key_value_heads": 8, "max_position_embeddings": 4096}
RECIPES = [
    *(f"int{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    "int4-g64-minmax",
    "int8-row",
    "mxfp4-a16",
    "nvfp4-a16",
    "mxfp8-a16",
    "fp8",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "int8-dynamic-act-int4-weight",
    "int8-dynamic-act-int8-weight",
    "float8-dynamic-act-float8-weight",
    "int4-g64-all",
]


def bar_of(recipe: str) -> float:
    """The most that one token may take at the shape of 8 B, over bfloat16."""
    rule = qkit.recipe(recipe).rules[-1]
    assert rule.weight is not None
    if rule.activation:
        return 1.0
    if rule.weight.element.bits > 4:
        return 0.8
    return 0.68 if rule.weight.element.kind == "float" else 0.6


def built(size: str, layers: int | None) -> nn.Module:
    """A bfloat16 Llama on the device."""
    engine = qkit.backend("torchao").on("cuda")
    sizes = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    with torch.device("cuda"):
        return engine.build({**CONFIG, **sizes, "dtype": "bfloat16"}).eval()


def stored(model: nn.Module) -> int:
    """Bytes of all tensors of `model`, shared ones once; those of torchao's by their parts."""
    parts: dict[int, torch.Tensor] = {}

    def add(tensor: torch.Tensor) -> None:
        names = getattr(tensor, "tensor_data_names", None)
        if names:
            more = [*names, *getattr(tensor, "optional_tensor_data_names", [])]
            for name in more:
                if (part := getattr(tensor, name, None)) is not None:
                    add(part)
        else:
            parts[tensor.data_ptr()] = tensor

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
    return sum(part.numel() * part.element_size() for part in parts.values())


def needed(model: nn.Module) -> float:
    """Bytes that the grids of a converted model need, and its float tensors."""
    rows = [row for row in qkit.coverage(model).rows if not row.tied]
    small = sum(one.numel() * one.element_size() for one in model.parameters() if one.dim() < 2)
    return small + sum(_bits(row) * prod(row.shape) / 8 for row in rows)


def _bits(row: Any) -> float:
    """Bits a weight of a layer's grid, or of its float type; files may have more, of int8 codes for one."""
    return qkit.Grid.parse(row.weight).bits_per_weight(row.shape) if row.weight else row.bits


Captured = tuple[torch.cuda.CUDAGraph, Any]  #: a graph, and the tensors that it reads, which have to live as long


def captured(model: nn.Module, tokens: int, mask: torch.Tensor | None = None) -> Captured:
    """The forward of so many tokens as a CUDA graph; logits of the last."""
    ids = torch.randint(0, CONFIG["vocab_size"], (1, tokens), device="cuda")  # type: ignore[call-overload]

    def forward() -> None:
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # the tokens and the weights are drawn there
    with torch.no_grad(), torch.cuda.stream(side):
        forward()
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        forward()
    return graph, (ids, mask)


def compiled(model: nn.Module) -> Captured:
    """One token, with each layer of `model` compiled, which stays so."""
    torch.compiler.reset()  # else layers of the ninth model run uncompiled
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=False)
    mask = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16)  # else transformers makes one in captures alone
    return captured(model, 1, mask)


def linears(model: nn.Module, names: list[str]) -> Captured:
    """One token through the layers of `names`, as a CUDA graph."""
    layers = [model.get_submodule(name) for name in names]
    sizes = {layer.in_features for layer in layers}
    inputs = {size: torch.randn(1, size, device="cuda", dtype=torch.bfloat16) for size in sizes}

    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph, inputs


def milliseconds(made: Captured, replays: int) -> float:
    """Device time of one replay."""
    graph, _ = made
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def ratios(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Times of the graphs of `other` over those of `plain`, in turns of one run."""
    found = {}
    for name in plain.keys() & other.keys():
        replays = 3 if name == "prefill" else 20
        jobs = {key: partial(milliseconds, graphs[name], replays) for key, graphs in (("a", plain), ("b", other))}
        times = in_turn(jobs, 5)
        found[name] = round(statistics.median(times["b"]) / statistics.median(times["a"]), 3)
    return found


def per_second(model: Any) -> float:
    """Tokens that `generate` makes in a second, by the clock."""
    ids = torch.ones(1, 8, dtype=torch.long, device="cuda")
    run = partial(model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    run(max_new_tokens=4)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    torch.cuda.synchronize()
    return round(TOKENS / (time.perf_counter() - begin), 1)


def peers() -> dict[str, Any]:
    """Torchao's own configurations."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        PerRow,
    )

    return {
        "torchao Int4WeightOnlyConfig g128": Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        ),
        "torchao Float8WeightOnlyConfig": Float8WeightOnlyConfig(),
        "torchao Float8DynamicActivationFloat8Weight": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }


def theirs(model: Any, config: Any) -> Any:
    """`model` quantized by torchao, but for its head."""
    from torchao.quantization import quantize_

    head, model.lm_head = model.lm_head, None
    quantize_(model, config)
    model.lm_head = head
    return model


def graphs_of(model: nn.Module, names: list[str], *, compiles: bool) -> dict[str, Captured]:
    """One token in each way, and the prefill; the layers of `model` are compiled afterwards, where `compiles` says so."""
    graphs = {"eager": captured(model, 1), "prefill": captured(model, PROMPT), "linears": linears(model, names)}
    return graphs | ({"compiled": compiled(model)} if compiles else {})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--layers", type=int, help="layers, in place of 16 and 32; of 8 on a CPU")
    parser.add_argument("--recipe", nargs="+")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a CPU")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.device == "cpu":
        import serve_cpu

        serve_cpu.measure(given.out, layers=given.layers or 8, recipes=given.recipe, threads=given.threads)
        return
    about = {"prompt": PROMPT, "layers": given.layers or "all", "vocabulary": CONFIG["vocab_size"]}
    report = Report(given.out, device="cuda", packages=("transformers", "triton"), about=about)
    for size in given.size:
        torch.manual_seed(0)
        plain = built(size, given.layers)
        names = [name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
        base_bytes, base_speed = stored(plain), per_second(plain)
        float_model = copy.deepcopy(plain)
        base = graphs_of(float_model, names, compiles=not given.no_compile)
        shown = {name: round(milliseconds(graph, 5), 3) for name, graph in base.items()}
        report.add({"model": size, "recipe": "bfloat16", "ms": shown, "bytes": base_bytes, "tokens/s": base_speed})
        jobs: dict[str, Callable[[Any], Any]] = {
            name: partial(lambda name, model: qkit.convert(model, name), name) for name in given.recipe or RECIPES
        }
        jobs |= {name: partial(lambda config, model: theirs(model, config), config) for name, config in peers().items()}
        for name, convert in jobs.items():
            row: dict[str, Any] = {"model": size, "recipe": name}
            try:
                report.add(row | measured(convert(copy.deepcopy(plain)), base, base_bytes, name, names))
            except Exception as error:  # a peer may lack a package: the table shows it, and goes on
                report.add(row | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
            torch.cuda.empty_cache()
    report.finish()


def measured(model: nn.Module, base: dict[str, Any], base_bytes: int, name: str, names: list[str]) -> dict[str, Any]:
    """The row of one converted model; `names` are the linear layers."""
    ours = name in qkit.recipes()
    how = qkit.coverage(model).rows[1].state if ours else ""
    kept = stored(model), needed(model) if ours else 0
    row: dict[str, Any] = {"memory": round(kept[0] / base_bytes, 3), "tokens/s": per_second(model)}
    row = ratios(base, graphs_of(model, names, compiles=ours and "compiled" in base)) | row
    if ours:
        spare, bar = kept[0] / kept[1], bar_of(name)
        within = {way: row[way] <= bar for way in ("linears", "compiled", "eager") if way in row}
        within |= {"prefill": row["prefill"] <= PREFILL, "memory": spare <= MEMORY}
        row |= {"memory / packed": round(spare, 3), "bar": bar, "within": within, "how": how}
    return row


if __name__ == "__main__":
    main()
