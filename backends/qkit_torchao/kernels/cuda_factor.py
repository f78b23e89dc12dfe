"""Launches of the kernels of `factor.cu`: the parts of `exact_products.make_lower` on a GPU, in the bits of the law."""

import torch
from torch import Tensor

from qkit.reference.products import BITS, BLOCK
from qkit_torchao.arithmetic import exact_products
from qkit_torchao.kernels import fits, nvrtc
from qkit_torchao.kernels.fit_launches import EXACT, THREADS, launch
from qkit_torchao.kernels.nvrtc import NUMBER, POINTER

TALL = 4  #: rows that the program of `eliminate` changes at once
TEAMS = THREADS // 32  #: rows of a program of `halve_rows`
DIGITS = 3  #: of eight bits each
LANES = 4  #: threads of a row in `eliminate_below`
TILE, SQUARE = 64, 256  #: rows and columns of a program of `take_products`, and its threads
PANEL = (("BLOCK", BLOCK),)
BELOW = (*PANEL, ("LANES", LANES))

ELIMINATE = nvrtc.Kernel("factor.cu", "eliminate", (POINTER,) * 3 + (NUMBER,) * 2, options=EXACT)
ELIMINATE_BELOW = nvrtc.Kernel("factor.cu", "eliminate_below", (POINTER,) * 5 + (NUMBER,) * 2, options=EXACT)
TAKE_PRODUCTS = nvrtc.Kernel("factor.cu", "take_products", (POINTER,) * 3 + (NUMBER,) * 3, options=EXACT)
HALVE_ROWS = nvrtc.Kernel("factor.cu", "halve_rows", (POINTER,) * 6 + (NUMBER,) * 3, options=EXACT)


def eliminate(a: Tensor, pivots: Tensor, start: int, end: int, last: int) -> None:
    """See `exact_products.make_lower`."""
    count, rest, stride = end - start, len(a) - end, a.stride(0)
    panel, before, mine = a[start:, start:end], a.new_empty(BLOCK, BLOCK), pivots[start:end]
    launch(ELIMINATE, PANEL, (1, 1), (panel, before, mine), (stride, count), threads=TALL * BLOCK)
    if not rest:
        return
    left, parts = a.new_empty(2, rest * 2 * BLOCK)
    given = panel, before, mine, left, parts
    launch(ELIMINATE_BELOW, BELOW, (-(-rest // (THREADS // LANES)), 1), given, (stride, rest))
    if width := last - end:
        tiles = -(-width // TILE), -(-rest // TILE)
        launch(TAKE_PRODUCTS, PANEL, tiles, (a[end:, end:last], left, parts), (stride, rest, width), threads=SQUARE)


def take_product(a: Tensor, below: Tensor, pivots: Tensor) -> None:
    """See `exact_products.take_product`."""
    if not fits.have_digits(a.device):
        return exact_products.take_product(a, below, pivots)
    from qkit_torchao.kernels import cuda_digits  # here: it wants Triton

    (rows, width), device = below.shape, a.device
    left, right = (torch.empty(DIGITS, rows, 2 * width, dtype=torch.int8, device=device) for _ in range(2))
    units, sizes = a.new_empty(rows), a.new_empty(rows)
    given = below, pivots, left, right, units, sizes
    launch(HALVE_ROWS, PANEL, (-(-rows // TEAMS), 1), given, (below.stride(0), rows, width))
    finer = units * -(2.0**-BITS)
    for start in range(0, rows, exact_products.STRIP):
        strip, under = slice(start, start + exact_products.STRIP), slice(start, None)
        small = torch.zeros_like(a[under, strip], memory_format=torch.contiguous_format)
        cuda_digits.subtract_product(small, left[:, under], finer[under], right[:, strip], sizes[strip])
        by = left[:, under, :width], units[under], right[:, strip, width:], sizes[strip]
        cuda_digits.subtract_product(a[under, strip], *by, more=small)
    return None
