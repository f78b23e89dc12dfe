"""The CUDA kernels beside a copy of the same tensor: fake-quantizing, packing, one linear layer in e4m3. CUDA only.

Tensors rotate, so that none is found in the cache; medians of device times, with the spread.

Usage: python benchmarks/kernels.py [--part NAME ...] [--out FILE.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measure import Report
from qkit_torchao.kernels import choose, cuda
from qkit_torchao.layers import products
from torch import nn
from torch.profiler import ProfilerActivity, profile
from train_step import captured

import qkit
from qkit.grid import Grid

GRIDS = [
    *(Grid(f"int{bits}", 32) for bits in (2, 3, 4, 5, 6)),
    *(Grid("int4", 64, rule) for rule in ("signed", "absmax", "midmax", "minmax")),
    Grid("int4", 128),
    Grid("int8", 64),
    Grid("int8", "row"),
    *(Grid("e2m1", 32, rule) for rule in ("rceil", "even", "floor")),
    Grid("e4m3", 32),
    Grid("e5m2", 32),
    Grid("e4m3", "row"),
    Grid("e2m1", 16, "nvfp4"),
]
FLOAT8 = "float8-dynamic-act-float8-weight"
SHAPES = [(4096, 14336), (8192, 8192)]
ROTATE = 4


def milliseconds(run: Callable[[], Any], repeats: int = 15) -> tuple[float, float, float]:
    """Median, least and greatest device time of `run`, each of 4 runs in a graph of their own."""
    replay = captured(run)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), min(times), max(times)


def summed(ends: Sequence[float], digits: int | None = None) -> dict[str, Any]:
    """A figure of its median and two ends."""
    median, *bounds = (round(end, digits) for end in ends)
    return {"median": median, "spread": bounds}


def kernels(report: Callable[[dict[str, Any]], None]) -> None:
    """Fake-quantizing and quantizing every grid."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            ws = [torch.randn(shape, device="cuda").to(dtype) for _ in range(ROTATE)]
            outs = [torch.empty_like(w) for w in ws]
            gates = [torch.tensor(True, device="cuda")]

            def copy(ws: list = ws, outs: list = outs) -> None:
                for w, out in zip(ws, outs, strict=True):
                    out.copy_(w)

            base = milliseconds(copy)
            size = ws[0].numel() * ws[0].element_size() * ROTATE
            report({"shape": shape, "type": str(dtype)[6:], "job": "copy", "ms": base[0] / ROTATE,
                    "GB/s read and written": round(2 * size / base[0] / 1e6)})  # fmt: skip
            for grid in GRIDS if dtype == torch.bfloat16 else GRIDS[2:3] + GRIDS[11:12]:

                def fake(grid: Grid = grid, ws: list = ws, outs: list = outs, gates: list = gates) -> None:
                    for w, out in zip(ws, outs, strict=True):
                        cuda.compute_values([w], [out], gates, grid, [()])

                times = milliseconds(fake)
                ratios = summed([t / base[0] for t in times], 3)
                report({"shape": shape, "type": str(dtype)[6:], "job": f"fake-quantize {grid}", "time / copy": ratios})


def packing(report: Callable[[dict[str, Any]], None]) -> None:
    """Codes of 4 bits of a bfloat16 weight, as a converted layer holds them, on the device; and the memory it takes besides."""
    grids = [Grid("int4", group) for group in (32, 64, 128)]
    grids += [Grid("int4", 64, "minmax"), Grid("e2m1", 32), Grid("e2m1", 16, "nvfp4")]
    for shape in SHAPES:
        for grid in grids:
            ws = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(ROTATE)]
            broken = torch.zeros(1, device="cuda", dtype=torch.int32)

            def pack(ws: list = ws, grid: Grid = grid, broken: torch.Tensor = broken) -> None:
                for w in ws:
                    choose.laid_out(w, grid, "words", broken=broken, number=0)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            laid = choose.laid_out(ws[0], grid, "words", broken=broken, number=0)
            size = ws[0].numel() * 2
            parts = [laid.codes, laid.scales, laid.zeros, laid.tensor_scale]
            held = sum(part.numel() * part.element_size() for part in parts if part is not None)
            scratch = (torch.cuda.max_memory_allocated() - before - held) / size
            times = milliseconds(pack)
            report({"shape": shape, "job": f"pack {grid} in words", "scratch / weight": round(scratch, 3),
                    "GB/s of input": summed([size * ROTATE / t / 1e6 for t in times])})  # fmt: skip


def converting(report: Callable[[dict[str, Any]], None]) -> None:
    """`qkit.convert` of a model of linear layers: the search for numbers that are not finite, the codes, the packing.

    By the clock, and by what the device was busy with.
    """
    for recipe in ("int4-g32", "int4-g64", "int4-g128", "int4-g64-minmax", "mxfp4-a16", "nvfp4-a16"):
        for shape, count in ((SHAPES[0], 1), (SHAPES[0], 16), (SHAPES[1], 16)):
            clock, busy = [], []
            for number in range(9):
                linears = [
                    nn.Linear(*reversed(shape), bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(count)
                ]
                model = nn.Sequential(*linears)
                size = sum(linear.weight.numel() * 2 for linear in linears)
                del linears
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                watched = number > 5
                with profile(activities=[ProfilerActivity.CUDA]) if watched else nullcontext() as seen:
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    model = qkit.convert(model, recipe)
                    torch.cuda.synchronize()
                    took = time.perf_counter() - begin
                if watched:
                    busy.append(sum(event.self_device_time_total for event in seen.key_averages()) / 1e6)
                elif number:
                    clock.append(took)
                held = torch.cuda.memory_allocated() - (before - size)
                scratch = (torch.cuda.max_memory_allocated() - before - held) / size
            speeds = {
                name: summed([size / t / 1e9 for t in (statistics.median(times), max(times), min(times))])
                for name, times in (("clock", clock), ("device", busy))
            }
            report({"shape": shape, "layers": count, "job": f"convert to {recipe}", "scratch / weight": round(scratch, 3),
                    "GB/s of input by the clock": speeds["clock"], "GB/s by the device": speeds["device"]})  # fmt: skip


def float8(report: Callable[[dict[str, Any]], None]) -> None:
    """Forward and backward of one linear layer, 8192 x 14336 x 4096, in bfloat16 and on e4m3 codes of both sides."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(8192, 14336, device="cuda", dtype=torch.bfloat16)
    plain = nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16)
    base = None
    for recipe, products.FAST in (
        ("", False),
        (FLOAT8, False),
        (FLOAT8, True),
        ("int8-dynamic-act-int8-weight", False),
    ):
        layer = nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16)
        layer.load_state_dict(plain.state_dict())
        layer = qkit.prepare(nn.Sequential(layer), recipe) if recipe else layer

        def step(layer: nn.Module = layer) -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(gradient)

        step()
        grads = [x.grad.double(), next(layer.parameters()).grad.double()]
        row: dict[str, Any] = {"job": f"linear 8192 x 14336 x 4096 {recipe or 'bfloat16'}{' fast' * products.FAST}"}
        if recipe:
            grid = layer[0].rule.weight
            values = [choose.rounded(t.detach(), g) for t, g in ((plain.weight, grid), (x, layer[0].rule.activation))]
            wants = [gradient.double() @ values[0].double(), gradient.double().T @ values[1].double()]
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(grads, wants, strict=True)]
            row["relative error of dx, dW"] = [round(e, 5) for e in errors]
            del wants
        del grads
        times = milliseconds(step)
        base = base or times[0]
        report({**row, "ms": times[0], "time / bfloat16": summed([t / base for t in times], 4)})


JOBS = {"kernels": kernels, "packing": packing, "converting": converting, "float8": float8}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", nargs="+", choices=JOBS, default=list(JOBS))
    given = parser.parse_args()
    report = Report(given.out, device="cuda")
    for part in given.part:
        JOBS[part](report.add)
    report.finish()


if __name__ == "__main__":
    main()
