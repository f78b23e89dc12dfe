"""Compares products of digits, by Triton's interpreter, and `solve` that has them, with the law. For test_fit_kernels.py."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

import numpy as np
import torch
from fit_on_host import HostKernel
from qkit_torchao.arithmetic import exact_products, fitting
from qkit_torchao.kernels import cuda_digits, cuda_factor, cuda_fit, cuda_moments, fits, nvrtc

from qkit.grid import Grid
from qkit.reference import products
from qkit.reference.fitting import fit


def digits(numbers: torch.Tensor) -> torch.Tensor:
    """int8 [3, ...] of integers [...] up to 2^20, the lowest first: their sum, times 1, 256 and 65,536."""
    low = (numbers + 128).remainder(256) - 128
    middle = ((numbers - low) // 256 + 128).remainder(256) - 128
    return torch.stack([low, middle, (numbers - low - 256 * middle) // 65536]).to(torch.int8)


def product(rows: int, columns: int, inputs: int) -> bool:
    """Whether a product of the largest numbers, and of others, is exact."""
    left, right = (torch.randint(-(2**20), 2**20 + 1, (m, inputs)) for m in (rows, columns))
    left[0], right[0] = 2**20, -(2**20)
    out, units, sizes = (
        torch.randn(rows, columns).double(),
        torch.rand(rows).double(),
        torch.full((columns,), 0.5).double(),
    )
    units = torch.exp2(torch.frexp(units).exponent.double() - 40)
    wanted = out - (left @ right.T).double() * units[:, None] * sizes
    cuda_digits.subtract_product(out, digits(left), units, digits(right), sizes)
    return torch.equal(out, wanted)


def solves(group: int, folder: Path) -> bool:
    """Whether `solve` has the codes of the law."""
    for module in (cuda_fit, cuda_factor, cuda_moments):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, nvrtc.Kernel):
                setattr(module, name, HostKernel(kernel, folder))
    cuda_fit.WARP = 1
    products.PANEL = exact_products.PANEL = 64
    fits.loops, fits.moments, fits.have_digits = (
        lambda w, grid: cuda_fit.Loops,
        lambda h: cuda_moments,
        lambda device: True,
    )
    draw, grid = np.random.default_rng(0), Grid("int4", group)
    x = draw.standard_normal((900, 192)) * np.exp(draw.standard_normal(192))
    h, w = (x.T @ x / 900).astype(np.float32), draw.standard_normal((8, 192)).astype(np.float32)
    law, found = fit(w, grid, h, method="solve"), fitting.solve_on(w, grid, h, device=torch.device("cpu"))
    return all(part.tobytes() == found.parts()[name].tobytes() for name, part in law.parts().items())


def main() -> None:
    """Prints a line for every comparison."""
    torch.manual_seed(0)
    for shape in ((5, 70, 64), (130, 48, 80), (8, 8, 4096)):
        print("exact" if product(*shape) else f"{shape} differ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print("exact" if solves(32, Path(folder)) else "codes differ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
