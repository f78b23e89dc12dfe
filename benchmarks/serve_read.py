"""Layers on read grids on CUDA: one token, 16 rows and a prefill through the linear layers of 8 B shape, over bfloat16.

Codes and scales are random, of the types that files have. Each stack runs in a CUDA graph, in turns with the float one. `before`
is a stack that torch's own operations decode at every call. No transformers, no files.

Usage: python benchmarks/serve_read.py [--layers 4] [--grid GRID ...] [--out FILE.json]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import captured
from measure import Report, in_turn
from torch import nn
from torch.nn import functional as F

import qkit
from qkit.qtensor import QTensor

SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
ROWS = {"token": 1, "16 rows": 16, "prefill": 2048}
BARS = {4: 0.68, 8: 0.8}  #: one token over bfloat16, by bits; those of the law's grids with e2m1 codes
#: Grids, and the types of their floats: mlx-community, GPTQ and AWQ, llm-compressor, gpt-oss, NVFP4; one of the law's beside.
GRIDS = {
    "int4-g64-affine": torch.bfloat16,
    "int4-g128-stored-zeros": torch.float16,
    "int4-g128-stored": torch.float16,
    "e2m1-g32-stored-e8m0": torch.uint8,
    "e2m1-g16-stored-nvfp4-inverse": torch.uint8,
    "int8-g64-affine": torch.bfloat16,
    "e4m3-row-stored": torch.float32,
    "int4-g64-minmax": torch.float32,
}


def quantized(grid: qkit.Grid, shape: tuple[int, int], kind: torch.dtype) -> QTensor[Any]:
    """Random codes on `grid`, with scales of `kind` of the size that weights have."""
    draw = {"device": "cuda"}
    levels = grid.element.levels
    if grid.element.kind == "integer" and grid.symmetric:
        codes = torch.randint(grid.element.lowest, grid.element.highest + 1, shape, dtype=torch.int8, **draw)
    else:
        codes = torch.randint(0, levels + 1 if grid.element.bits < 8 else 120, shape, dtype=torch.uint8, **draw)
    groups = grid.scale_shape(shape)
    if kind == torch.uint8:
        scales = torch.randint(115, 120, groups, dtype=torch.uint8, **draw)
    else:
        scales = (torch.rand(groups, **draw) * 2.0**-8 + 2.0**-9).to(torch.bfloat16).to(kind)
    return QTensor(
        codes, scales, grid, "bfloat16",
        zeros=torch.randint(0, levels + 1, groups, dtype=torch.uint8, **draw) if grid.has_zeros else None,
        tensor_scale=torch.tensor(64.0, **draw) if grid.has_tensor_scale else None,
        biases=(scales.float() * -levels / 2).to(kind) if grid.has_biases else None,
    )  # fmt: skip


class Decoded(nn.Module):
    """A layer as before: torch's operations decode it at every call."""

    def __init__(self, q: QTensor[Any]) -> None:
        super().__init__()
        from qkit_torchao.arithmetic import packing

        self.laid, self.in_features = packing.lay(q, "words"), q.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, inputs] -> [rows, outputs]."""
        from qkit_torchao.arithmetic import packing, rounding

        return F.linear(x, rounding.dequantize(packing.unlay(self.laid)))


def graph(layers: list[Any], rows: int) -> Callable[[], None]:
    """So many rows through each of `layers`, as a CUDA graph."""
    xs = {size: torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in {4096, 14336}}

    def run() -> None:
        for layer in layers:
            layer(xs[layer.in_features])

    with torch.no_grad():
        return captured(run)


def milliseconds(replay: Callable[[], None], replays: int) -> float:
    """Device time of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def over(base: dict[str, Callable[[], None]], layers: list[Any]) -> dict[str, float]:
    """Times of `layers` over those of the float graphs, in turns of one run."""
    found = {}
    for name, rows in ROWS.items():
        jobs, replays = {"a": base[name], "b": graph(layers, rows)}, 3 if rows > 100 else 20
        times = in_turn({key: partial(milliseconds, one, replays) for key, one in jobs.items()}, 5)
        found[name] = round(statistics.median(times["b"]) / statistics.median(times["a"]), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--grid", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = Report(given.out, device="cuda", packages=("triton",), about={"layers": given.layers, "rows": ROWS})
    shapes, engine = SHAPES * given.layers, qkit.backend("torchao")
    floats = [nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for n, k in shapes]
    base = {name: graph(floats, rows) for name, rows in ROWS.items()}
    report.add({"grid": "bfloat16", "ms": {name: round(milliseconds(one, 5), 3) for name, one in base.items()}})
    for text in given.grid:
        grid = qkit.Grid.parse(text)
        qs = [quantized(grid, shape, GRIDS[text]) for shape in shapes]
        layers = [
            engine.pack(nn.Linear(k, n, bias=False, device="cuda"), q, qkit.Rule(("*",), weight=grid))
            for q, (n, k) in zip(qs, shapes, strict=True)
        ]
        row = {"grid": text, **over(base, layers), "how": layers[0].execution.text}
        row["within"] = {"token": row["token"] <= BARS[grid.element.bits], "prefill": row["prefill"] <= 1.12}
        if text == "int4-g64-affine":
            row["before"] = over(base, [Decoded(q) for q in qs])
        report.add(row)
        del qs, layers
        torch.cuda.empty_cache()
    report.finish()


if __name__ == "__main__":
    main()
