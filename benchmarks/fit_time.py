"""The time of `solve` for the linear layers of one block of an 8 B Llama, on one GPU, beside the loop of GPTQ in fp32.

Weights and inputs are drawn. Both begin and end on the device. Layers with the same inputs share their moments, which `solve`
prepares once. The loop is that of llm-compressor's eager form: a Cholesky factor for each layer, and blocks of 128 columns, one
after the other, with integers of four bits on groups of 32, whatever grid `solve` has. "Without its columns" has the factors and
products alone: no form of the loop, such as llm-compressor's own kernel, takes less. `--check` compares codes of some rows with
those of the law; on more than 2,048 inputs the law starts from the factors of the device. `--profile` prints the time of kernels.

Usage: python -P benchmarks/fit_time.py [--device cuda] [--grids int4-g32,mxfp4] [--repeats N] [--scale N] [--check ROWS]
       [--profile] [--out FILE.json]
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # -P leaves it out, since kernels.py here would hide a package of that name

import torch
from clock import seconds
from measure import Report, spread
from qkit_torchao.arithmetic.fitting import solve, solve_on
from qkit_torchao.arithmetic.moments import DeviceMoments
from torch import Tensor

from qkit.grid import Grid
from qkit.reference.fitting import fit
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
BLOCK, DAMPING, GROUP = 128, 0.01, 32  # of the loop of GPTQ
LARGEST = 2048  # inputs whose moments the law prepares itself


def drawn(n: int, device: torch.device) -> Tensor:
    """Moments [n, n] of twice as many correlated inputs."""
    random = torch.Generator(device).manual_seed(n)
    x = torch.randn(2 * n, n, generator=random, device=device) + torch.randn(n, generator=random, device=device)
    x = x * torch.randn(n, generator=random, device=device).exp()
    return x.T @ x / len(x)


def gptq(weights: list[Tensor], moments: Tensor, *, columns: bool = True) -> None:
    """Values of each weight by GPTQ (https://arxiv.org/abs/2210.17323), step by step as llm-compressor's eager form.

    Args:
        columns: whether columns are rounded; else only factors and products are computed, which any form of the loop needs.
    """
    for weight in weights:
        w, damped = weight.clone(), moments.clone()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper = torch.linalg.cholesky(inverse, upper=True)
        scales = w.unflatten(-1, (-1, GROUP)).abs().amax(-1) / 7.5
        of_columns = scales.repeat_interleave(GROUP, 1)
        losses = torch.zeros(len(w), device=w.device)
        for start in range(0, w.shape[1], BLOCK):
            end = min(start + BLOCK, w.shape[1])
            block, of_block, steps = w[:, start:end].clone(), upper[start:end, start:end], of_columns[:, start:end]
            values, errors, squares = (torch.zeros_like(block) for _ in range(3))
            for i in range(end - start) if columns else ():
                of = block[:, i]
                q = (of / steps[:, i]).round().clamp(-8, 7) * steps[:, i]
                error = (of - q) / of_block[i, i]
                values[:, i], errors[:, i], squares[:, i] = q, error, error.square()
                block[:, i:] -= error[:, None] * of_block[i, i:]
            w[:, start:end] = values
            losses += squares.sum(1) / 2
            w[:, end:] -= errors @ upper[start:end, end:]


def solved(weights: list[Tensor], moments: Tensor, grid: Grid) -> None:
    """The same weights by `solve`."""
    known = DeviceMoments.of(moments, moments.device)
    for w in weights:
        solve(w, grid, known)


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
        high, low, diagonal, order, upper = (
            a.cpu().numpy() for a in (*known.parts, known.diagonal, known.order, known.upper)
        )
        law = Moments(h, diagonal, known.damping, (high, low), order, upper)
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
    given = parser.parse_args()
    device, grids = torch.device(given.device), given.grids.split(",")
    report = Report(
        given.out,
        device=device.type,
        packages=("torch", "qkit-quant"),
        about={"scale": given.scale},
    )
    whole = dict.fromkeys(["loop", "without columns", *grids], 0.0)
    for width, layers in SHAPES:
        n, random = width // given.scale, torch.Generator(device).manual_seed(width)
        h = drawn(n, device)
        weights = [torch.randn(rows // given.scale, n, generator=random, device=device) * 0.02 for _, rows in layers]
        row: dict[str, Any] = {"layers": ", ".join(name for name, _ in layers), "inputs": n}

        def timed(run: Callable[[], Any]) -> dict[str, Any]:
            run()  # compiles
            return spread([seconds(run, device) for _ in range(given.repeats)], 3)

        loop = row["GPTQ's loop, seconds"] = timed(partial(gptq, weights, h))
        whole["loop"] += loop["median"]
        floor = row["GPTQ without its columns, seconds"] = timed(partial(gptq, weights, h, columns=False))
        whole["without columns"] += floor["median"]
        row["GPTQ's loop, peak GB"] = peak_of(partial(gptq, weights[:1], h), device)
        for name in grids:
            run = partial(solved, weights, h, GRIDS[name])
            taken = row[f"{name}, seconds"] = timed(run)
            row[f"{name}, over the loop"] = round(taken["median"] / loop["median"], 3)
            row[f"{name}, peak GB"] = peak_of(run, device)
            whole[name] += taken["median"]
            if given.check:
                row[f"{name}, not the law's"] = differing(weights[0][: given.check], h, GRIDS[name])
            if given.profile:
                with torch.profiler.profile() as kernels:
                    run()
                order = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
                print(kernels.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=50))
        report.add(row)
        del h, weights
    ratios = {f"{name}, over the loop": round(whole[name] / whole["loop"], 3) for name in grids}
    report.add({"layers": "all of a block", **{f"{name}, seconds": round(t, 3) for name, t in whole.items()}, **ratios})
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
