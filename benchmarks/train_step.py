"""A step of training on the grid beside a plain step: Llamas on CUDA, the whole step in a CUDA graph, or a small one on the CPU.

Plain steps use torch's fused AdamW and qkit's. torchao's QAT stands beside. Each variant is timed against the plain step of the
same run, in turn; what is printed is the median of the ratios of pairs, with the least and the greatest.

Usage: python benchmarks/train_step.py [--part NAME ...] [--repeats N] [--out FILE.json]
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clock import captured
from measure import Report, spread
from small_llama import Llama, Size
from torch.nn import functional as F

import qkit

SIZES = {  # hidden, intermediate, layers, vocabulary, batch, length
    "220M": (1024, 4096, 12, 10240, 8, 1024),
    "440M": (1024, 4096, 24, 16384, 8, 1024),
    "4.4M": (256, 1024, 4, 512, 8, 256),
    "cpu": (128, 256, 3, 256, 8, 128),
}


@dataclass(frozen=True)
class Variant:
    """One kind of step: a recipe (or a peer's config), an optimizer, and whether layers are compiled."""

    name: str
    recipe: str = ""
    optimizer: str = "torch"  # or qkit
    compiled: bool = False
    peer: str = ""
    accumulation: int = 1
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False


@dataclass
class Case:
    """A size, the plain variant that others are divided by, and the others."""

    size: str
    plain: Variant
    others: list[Variant] = field(default_factory=list)
    graphs: bool = True


def cases(part: str) -> Iterator[Case]:
    """The cases of one part."""
    if part[:4] in ("220M", "440M"):
        for compiled in (False, True) if part.isalnum() else (part.endswith(" compiled"),):
            how = " compiled" if compiled else ""
            plain = Variant("plain, torch's AdamW" + how, compiled=compiled)
            others = [Variant("plain, qkit.adamw" + how, optimizer="qkit", compiled=compiled)]
            recipes = ["int4-g32", "int3-g64", "mxfp4-a16", "int8-dynamic-act-int4-weight", "mxfp4", "nvfp4-a16"]
            for recipe in recipes if part[:4] == "220M" else recipes[:3]:
                for optimizer in ("qkit", "torch") if recipe == "int4-g32" else ("qkit",):
                    name = f"{recipe}, {optimizer}'s AdamW{how}"
                    others.append(Variant(name, recipe, optimizer, compiled))
            if part[:4] == "220M":
                others += [
                    Variant(f"torchao {p} QAT, torch's AdamW{how}", peer=p, compiled=compiled)
                    for p in (("int4",) if compiled else ("int4", "int8-int4"))
                ]
            yield Case(part[:4], plain, others)
    if part == "accumulation":
        plain = Variant("plain, 8 micro-batches", accumulation=8)
        yield Case("220M", plain, [Variant(f"int4-g32, {o}", "int4-g32", o, accumulation=8) for o in ("torch", "qkit")])
    if part == "4.4M":
        kind: dict[str, Any] = {"dtype": torch.float32, "autocast": True}
        others = [Variant(f"{r}, {o}", r, o, **kind) for r in ("int4-g32", "mxfp4-a16") for o in ("torch", "qkit")]
        others += [Variant("torchao int4 QAT", peer="int4", **kind)]
        yield Case(part, Variant("plain, autocast", **kind), others)
    if part == "wall":
        others = [Variant(f"{r}, {o}", r, o) for r in ("int4-g32", "mxfp4-a16") for o in ("torch", "qkit")]
        others += [Variant("int8-dynamic-act-int4-weight, qkit", "int8-dynamic-act-int4-weight", "qkit")]
        others += [Variant(f"torchao {p} QAT", peer=p) for p in ("int4", "int8-int4")]
        yield Case("220M", Variant("plain"), others, graphs=False)
    if part == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True):
                name = f"{str(dtype)[6:]}{' compiled' if compiled else ''}"
                same: dict[str, Any] = {"dtype": dtype, "compiled": compiled}
                others = [Variant(f"{r}, {name}", r, **same) for r in ("int4-g32", "int3-g32", "mxfp4-a16")]
                others += [Variant(f"torchao int4 QAT, {name}", peer="int4", **same)]
                yield Case("cpu", Variant(f"plain, {name}", **same), others, graphs=False)


def build(size: str, variant: Variant, device: str) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    """A function that makes one step and returns the loss, and the model."""
    hidden, intermediate, layers, vocabulary, batch, length = SIZES[size]
    torch.manual_seed(0)
    shape = Size(hidden, layers, intermediate, max(4, hidden // 64))
    model = Llama(shape, seed=0, longest=length, vocabulary=vocabulary).to(device, variant.dtype).train()
    if variant.recipe:
        model = qkit.prepare(model, variant.recipe)
    if variant.peer:
        peer(model, variant.peer)
    if variant.compiled:
        torch.compiler.reset()
        for layer in model.layers:
            layer.compile()
    if variant.optimizer == "qkit":
        optimizer = qkit.adamw(model, lr=1e-4)
    else:
        extra = {"capturable": True} if device == "cuda" else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, **extra)
    tokens = torch.randint(vocabulary, (variant.accumulation, batch, length + 1), device=device)

    def step() -> torch.Tensor:
        for part in tokens:
            with torch.autocast(device, torch.bfloat16, enabled=variant.autocast, cache_enabled=False):
                logits = model(part[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) / len(tokens)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, model


def peer(model: torch.nn.Module, name: str) -> None:
    """torchao's own QAT, with its defaults."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    head, model.lm_head = model.lm_head, None
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if name == "int8-int4" else None
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    model.lm_head = head


def seconds(run: Callable[[], Any], times: int, device: str) -> float:
    """Seconds of one run: between device events around several replays, or by the clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times / 1e3
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times


def compared(plain: Callable[[], Any], run: Callable[[], Any], times: int, device: str) -> tuple[float, float]:
    """Median seconds of both, run by run in turn, now one first and now the other: a card's clock wanders."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(times):
        for which in (0, 1) if number % 2 else (1, 0):
            found[which].append(seconds((plain, run)[which], 1, device))
    return statistics.median(found[0]), statistics.median(found[1])


def time_case(case: Case, device: str, repeats: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Times each variant of `case` against its plain one."""
    runs = {}

    def ready(variant: Variant) -> Callable[[], Any]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step, _ = build(case.size, variant, device)
        for _ in range(2):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
            runs[variant.name] = torch.cuda.max_memory_allocated() - before
        return captured(step) if case.graphs else step

    plain = ready(case.plain)
    times = 10 if case.graphs else 4
    if case.size == "4.4M":
        times = 100
    for variant in case.others:
        gc.collect()
        try:
            run = ready(variant)
        except Exception as error:  # a peer that does not run here must not end the others
            report({"size": case.size, "variant": variant.name, "error": str(error).splitlines()[0][:200]})
            continue
        chunks = [compared(plain, run, times, device) for _ in range(repeats + 1)][1:]  # the first warms up
        ratios = [b / a for a, b in chunks]
        row = {
            "size": case.size,
            "variant": variant.name,
            "plain": case.plain.name,
            "plain ms": round(1e3 * statistics.median(a for a, _ in chunks), 3),
            "ratio": spread(ratios),
        }
        if device == "cuda":
            row["peak MB over plain"] = round((runs[variant.name] - runs[case.plain.name]) / 1e6, 1)
        report(row)
        del run
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = ["220M", "440M", "4.4M", "accumulation", "wall"] if device == "cuda" else ["cpu"]
    parser.add_argument("--part", nargs="*", default=parts)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report(given.out, device=device)
    for part in given.part:
        for case in cases(part):
            time_case(case, device, given.repeats, report.add)
    report.finish()


if __name__ == "__main__":
    main()
