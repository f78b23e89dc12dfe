"""The time of `solve` for the linear layers of one block of an 8 B Llama, on one GPU, beside llm-compressor's GPTQ loop.

Weights and inputs are drawn. Layers with the same inputs share their moments, which `solve` prepares once; GPTQ's loop prepares
them for each layer. A plain GPTQ in fp32 of the same steps is timed everywhere, llm-compressor's where it is installed. `--check`
compares codes of some rows with those of the law.

Usage: python -P benchmarks/fit_time.py [--device cuda] [--grid int4|int2|nvfp4|mxfp4] [--repeats N] [--scale N] [--check ROWS]
       [--out FILE.json]
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # -P leaves it out, since kernels.py here would hide a package of that name

import numpy as np
import torch
from clock import seconds
from measure import Report, spread
from numpy.typing import NDArray
from qkit_torchao.arithmetic.fitting import DeviceMoments, solve_on

from qkit.grid import Grid
from qkit.reference.fitting import fit

SHAPES = [
    (4096, (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024))),
    (4096, (("o_proj", 4096),)),
    (4096, (("gate_proj", 14336), ("up_proj", 14336))),
    (14336, (("down_proj", 4096),)),
]
GRIDS = {
    "int4": Grid("int4", 32),
    "int2": Grid("int2", 32),
    "nvfp4": Grid("e2m1", 16, "nvfp4"),
    "mxfp4": Grid("e2m1", 32, "even"),
}
Floats = NDArray[np.float32]


def drawn(n: int, device: torch.device) -> Floats:
    """Moments [n, n] of twice as many correlated inputs."""
    random = torch.Generator(device).manual_seed(n)
    x = torch.randn(2 * n, n, generator=random, device=device) + torch.randn(n, generator=random, device=device)
    x = x * torch.randn(n, generator=random, device=device).exp()
    return (x.T @ x / len(x)).cpu().numpy()


def theirs(weights: list[Floats], h: Floats, device: torch.device, bits: int) -> None:
    """llm-compressor's GPTQ loop, for symmetric groups of 32."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    given = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    for w in weights:
        one = torch.tensor(w, device=device)[None]
        scale = one.unflatten(-1, (-1, 32)).abs().amax(-1) / ((2**bits - 1) / 2)
        zero = torch.zeros_like(scale)
        quantize_weight(one, torch.tensor(h, device=device)[None], scale, zero, None, given)


def plain_gptq(weights: list[Floats], h: Floats, device: torch.device, bits: int) -> None:
    """GPTQ (https://arxiv.org/abs/2210.17323) in fp32, column by column in blocks of 128, on scales of the largest values."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for w in weights:
        x, damped = torch.tensor(w, device=device), torch.tensor(h, device=device)
        damped.diagonal().add_(0.01 * damped.diagonal().mean())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
        scales = x.unflatten(-1, (-1, 32)).abs().amax(-1) / ((2**bits - 1) / 2)
        for start in range(0, x.shape[1], 128):
            end = min(start + 128, x.shape[1])
            block, errors = x[:, start:end].clone(), torch.zeros_like(x[:, start:end])
            for j in range(end - start):
                step = scales[:, (start + j) // 32]
                error = (block[:, j] - (block[:, j] / step).round().clamp(low, high) * step) / upper[
                    start + j, start + j
                ]
                block[:, j:] -= error[:, None] * upper[start + j, start + j : end]
                errors[:, j] = error
            x[:, end:] -= errors @ upper[start:end, end:]


def main() -> int:
    """Times each set of layers, and all of a block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grid", choices=GRIDS, default="int4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides all shapes")
    parser.add_argument("--check", type=int, default=0, help="rows of the first set whose codes are compared")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device, grid = torch.device(given.device), GRIDS[given.grid]
    report = Report(given.out, device=device.type, packages=("llmcompressor", "qkit-quant"), about={"grid": str(grid)})
    for width, layers in SHAPES:
        n, random = width // given.scale, np.random.default_rng(width)
        h = drawn(n, device)
        weights = [random.standard_normal((rows // given.scale, n), np.float32) * 0.02 for _, rows in layers]

        def ours(weights: list[Floats] = weights, h: Floats = h) -> None:
            known = DeviceMoments.of(h, device)
            for w in weights:
                solve_on(w, grid, known, device=device)

        row: dict[str, Any] = {"layers": ", ".join(name for name, _ in layers), "inputs": n}
        row["solve, seconds"] = spread([seconds(ours, device) for _ in range(given.repeats)], 3)
        if grid.element.kind == "integer":
            run = partial(plain_gptq, weights, h, device, grid.element.bits)
            row["plain GPTQ in fp32, seconds"] = spread([seconds(run, device) for _ in range(given.repeats)], 3)
            try:
                loop = [
                    seconds(lambda w=weights, h=h: theirs(w, h, device, grid.element.bits), device)
                    for _ in range(given.repeats)
                ]
                row["llm-compressor GPTQ, seconds"] = spread(loop, 3)
            except ImportError as error:
                row["llm-compressor GPTQ, seconds"] = f"not measured: {error}"
        if device.type == "cuda":
            row["peak memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            torch.cuda.reset_peak_memory_stats()
        if given.check:
            some = weights[0][: given.check]
            law, found = fit(some, grid, h, method="solve"), solve_on(some, grid, h, device=device)
            row["codes that differ"] = int((law.codes != found.codes).sum())
        report.add(row)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
