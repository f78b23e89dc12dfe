"""The time of `solve` for the linear layers of one block of an 8 B Llama, on one GPU, beside llm-compressor's own GPTQ.

Weights and inputs are drawn. Both begin and end on the device. Layers with the same inputs share their moments, which `solve`
prepares once. Of llm-compressor the very function runs that its modifier calls, with its default settings and with all layers of
one shape and the same inputs at once, as that does: with its Triton kernel, and once without. It rounds to integers of four bits
on groups of 32, whatever grid `solve` has. `--check` compares codes of some rows with those of the law; on more than 2,048 inputs
the law starts from the factors of the device. `--profile` prints the time of kernels.

The folder of `--peer` has llm-compressor, compressed-tensors and what that needs:
pip install --no-deps --target FOLDER llmcompressor compressed-tensors loguru

Usage: python -P benchmarks/fit_time.py [--device cuda] [--peer FOLDER] [--grids int4-g32,mxfp4] [--rounds 2,0] [--repeats N]
       [--scale N] [--check ROWS] [--profile] [--out FILE.json]
"""

import argparse
import importlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, cast

sys.path.append(str(Path(__file__).parent))  # -P leaves it out, since kernels.py here would hide a package of that name

import torch
from clock import seconds
from measure import Report, spread
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.fitting import solve, solve_on
from qkit_torchao.arithmetic.moments import DeviceMoments
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.fitting import ROUNDS, fit
from qkit.reference.moments import Moments

SHAPES = [
    (4096, (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024))),
    (4096, (("o_proj", 4096),)),
    (4096, (("gate_proj", 14336), ("up_proj", 14336))),
    (14336, (("down_proj", 4096),)),
]
GRIDS = {
    "int4-g32": Grid("int4", 32),
    "int4-g64": Grid("int4", 64),
    "int4-g128": Grid("int4", 128),
    "int2-g32": Grid("int2", 32),
    "nvfp4": Grid("e2m1", 16, "nvfp4"),
    "mxfp4": Grid("e2m1", 32, "even"),
}
GROUP, PEER = 32, "llm-compressor"
SLOW = f"{PEER} without Triton"
LARGEST = 2048  # inputs whose moments the law prepares itself


def drawn(n: int, device: torch.device) -> Tensor:
    """Moments [n, n] of twice as many correlated inputs."""
    random = torch.Generator(device).manual_seed(n)
    x = torch.randn(2 * n, n, generator=random, device=device) + torch.randn(n, generator=random, device=device)
    x = x * torch.randn(n, generator=random, device=device).exp()
    return x.T @ x / len(x)


def peer(folder: Path) -> Callable[..., Any]:
    """llm-compressor's `quantize_weight`, imported without the rest of the package, which needs much more."""
    sys.path.append(str(folder))
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
    return cast(
        "Callable[..., Any]", importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize").quantize_weight
    )


def by_peer(
    quantize_weight: Callable[..., Any], weights: list[Tensor], moments: Tensor, *, bits: int = 4
) -> list[Tensor]:
    """Values of each weight by llm-compressor's GPTQ, with scales of their largest magnitudes."""
    from compressed_tensors.quantization import QuantizationArgs

    settings = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP, actorder="static"
    )
    found = []
    for _, some in groupby(weights, key=len):
        stacked = torch.stack(list(some))  # it overwrites its arguments
        scales = stacked.unflatten(-1, (-1, GROUP)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        found += quantize_weight(stacked, moments.repeat(len(stacked), 1, 1), scales, zeros, None, settings)[0]
    return found


def solved(weights: list[Tensor], moments: Tensor, grid: Grid, rounds: int) -> list[QTensor[Tensor]]:
    """The same weights by `solve`."""
    known = DeviceMoments.of(moments, moments.device)
    return [solve(w, grid, known, rounds=rounds) for w in weights]


def error_of(weights: list[Tensor], found: list[Tensor], moments: Tensor) -> float:
    """The sum of d H d' over the rows of all weights, where d is a row less its values."""
    return sum(
        float(((w - values) @ moments).mul_(w - values).sum(dtype=torch.float64))
        for w, values in zip(weights, found, strict=True)
    )


def timed_into(
    row: dict[str, Any], whole: dict[str, float], device: torch.device, repeats: int, name: str, run: Callable[[], Any]
) -> None:
    """Adds the seconds and the peak memory of a run under its name to a row, and the seconds to those of a whole block."""
    run()  # compiles
    taken = row[f"{name}, seconds"] = spread([seconds(run, device) for _ in range(repeats)], 3)
    row[f"{name}, peak GB"] = peak_of(run, device)
    whole[name] += taken["median"]


def peak_of(run: Callable[[], Any], device: torch.device) -> float | None:
    """Gigabytes that a run allocates at most beside those that are there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def differing(w: Tensor, moments: Tensor, grid: Grid) -> int:
    """Codes and scales of rows `w` that are not those of the law."""
    known, h = DeviceMoments.of(moments, w.device), moments.cpu().numpy()
    law = h
    if len(h) > LARGEST:
        names = ("sizes", "correlations", "order", "upper")
        law = Moments(
            h, known.diagonal.cpu().numpy(), known.damping, *(getattr(known, name).cpu().numpy() for name in names)
        )
    wanted = fit(w.cpu().numpy(), grid, law, method="solve")
    found = solve_on(w.cpu().numpy(), grid, known, device=w.device)
    return sum(int((part != found.parts()[name]).sum()) for name, part in wanted.parts().items())


def main() -> int:
    """Times each set of layers, and all of a block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grids", default="int4-g32,mxfp4", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides all shapes")
    parser.add_argument("--check", type=int, default=0, help="rows of the first of each set that are compared")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", default=str(ROUNDS), help="of descent, at most; several with commas")
    parser.add_argument("--peer", type=Path, help="the folder that has llm-compressor")
    given = parser.parse_args()
    device, grids = torch.device(given.device), given.grids.split(",")
    report = Report(
        given.out,
        device=device.type,
        packages=("torch", "qkit-quant"),
        about={"scale": given.scale},
    )
    quantize_weight = given.peer and peer(given.peer)
    tried = [(name, int(rounds)) for name in grids for rounds in given.rounds.split(",")]
    whole: dict[str, float] = defaultdict(float)
    for width, layers in SHAPES:
        n, random = width // given.scale, torch.Generator(device).manual_seed(width)
        h = drawn(n, device)
        weights = [torch.randn(rows // given.scale, n, generator=random, device=device) * 0.02 for _, rows in layers]
        row: dict[str, Any] = {"layers": ", ".join(name for name, _ in layers), "inputs": n}

        timed = partial(timed_into, row, whole, device, given.repeats)
        if quantize_weight:
            run_peer = partial(by_peer, quantize_weight, weights, h)
            os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = "0"
            timed(PEER, run_peer)
            row[f"{PEER}, error"] = error_of(weights, run_peer(), h)
            os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = "1"
            row[f"{SLOW}, seconds"] = round(seconds(run_peer, device), 3)
            whole[SLOW] += row[f"{SLOW}, seconds"]
        for grid, rounds in tried:
            name = f"{grid} of {rounds} rounds"
            run = partial(solved, weights, h, GRIDS[grid], rounds)
            timed(name, run)
            row[f"{name}, error"] = error_of(weights, [rounding.dequantize(q) for q in run()], h)
            if given.check and rounds == ROUNDS:
                row[f"{grid}, not the law's"] = differing(weights[0][: given.check], h, GRIDS[grid])
            if given.profile:
                with torch.profiler.profile() as kernels:
                    run()
                order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
                print(kernels.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))
        report.add(row)
        del h, weights
    ratios = {f"{name}, over {PEER}": round(t / whole[PEER], 3) for name, t in whole.items() if PEER in whole}
    report.add({"layers": "all of a block", **{f"{name}, seconds": round(t, 3) for name, t in whole.items()}, **ratios})
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
