"""Launches of the kernels over packed codes, see `arithmetic.words`: products with few rows, values, packing. On CUDA.

Rows of x are float32, bfloat16 or float16. Sums are in float32, of the exact values of the codes; the output is rounded once.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import words
from qkit_torchao.arithmetic.packing import Laid
from qkit_torchao.kernels import triton_tiles, triton_unpack, triton_words
from qkit_torchao.kernels.cuda import INTERPRETED, device_of
from qkit_torchao.kernels.launches import Kernel

FEW = 4  #: the most rows that are multiplied without decoding: more pay for the values of the weight
SOME = 16  #: the most that tensor cores multiply by codes: more pay for decoding once
OUTER, STEP, WARPS = 32, 16, 2  #: of that product: outputs and words of a program, and its warps
PROGRAMS = 264  #: that fill a GPU of two programs on each of 132 processors
TILE = 1024  #: pairs of columns of a row that a program decodes
SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  #: types of 16 bits
ALIGNED = 16  #: bytes that are read at once
MANY = 2048  #: outputs that fill a GPU in blocks of four


@cache
def geometry(grid: Grid, inputs: int) -> dict[str, Any]:
    """The constants of weights on `grid` with `inputs` columns."""
    high, *low = words.PLANES[grid.element.bits]
    unit = words.unit(grid, inputs)
    units = -(-inputs // unit)
    number = isinstance(grid.group, int)
    return {
        "INPUTS": inputs,
        "ELEMENT": "integer" if grid.element.kind == "integer" else grid.element.name,
        "HIGH": high,
        "LOW": low[0] if low else 0,
        "UNIT": unit,
        "UNITS": units,
        "GROUP": grid.group if number else units * unit,
        "GROUPS": inputs // int(grid.group) if number else int(grid.group == "row"),
        "SCALES": "float" if grid.element.kind == "integer" else "e4m3" if grid.scale == "nvfp4" else "e8m0",
    }


def multiplies(x: Tensor) -> bool:
    """Whether `multiply` takes x [rows, inputs]."""
    return 0 < len(x) <= FEW


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, power: Tensor | None, bias: Tensor | None, grid: Grid,
    *, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [rows, inputs] times packed codes -> [rows, outputs], for grids and widths that `choose.why_not_few` accepts.

    Args:
        codes, scales, zeros, power: of a converted layer, in the layout `words`: codes int32 [outputs, words].
        bias: [outputs].
        experts: integers [rows]: then codes are [experts, outputs, words], as are scales, zeros and biases, and row r is
            multiplied by those of `experts[r]`. That is the grouped product of a mixture of experts for few tokens: repeat a
            token for each of its experts. For many tokens of an expert, see `values` of `codes[expert]`.
    """
    count, inputs = x.shape
    outputs = codes.shape[-2]
    rows = 1 if experts is not None else min(FEW, 1 << (count - 1).bit_length())
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    constants = geometry(grid, inputs)
    outer, across, warps = (2, 512, 4) if outputs <= MANY else (4, 256, 2)
    if constants["LOW"]:
        across, warps = 128, 1  # so that rows of the narrow plane fill a tile
    kind = str(x.dtype).rpartition(".")[2]
    x = x.contiguous()
    pairs = x if x.dtype == torch.float32 else x.view(torch.int32)
    tensors = pairs, codes, scales, zeros, power, bias, out, experts
    key = ("multiply", grid, x.dtype, outputs, inputs, rows, x.device, _kinds(tensors))
    blocks = -(-outputs // outer)
    with device_of(x):
        _multiply(
            key, blocks * -(-count // rows),
            (*tensors, outputs, count, triton_words.MAGIC, inputs, rows, kind, *list(constants.values())[1:], outer, across,
             INTERPRETED),
            warps=warps,
        )  # fmt: skip
    return out


def takes_some(x: Tensor, grid: Grid) -> bool:
    """Whether `multiply_some` takes x [rows, inputs]."""
    inputs = x.shape[-1]
    size = words.unit(grid, inputs)
    enough = inputs * words.PLANES[grid.element.bits][0] >= 32 * 16  # words of a row that a product needs
    return (
        x.dtype in SHORT and 0 < len(x) <= SOME and inputs % size == 0 and enough and words.has_one_scale(grid, inputs)
    )


def multiply_some(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    bias: Tensor | None,
    grid: Grid,
) -> Tensor:
    """As `multiply`, on tensor cores: values are rounded to the type of x, as `values` rounds them. For `takes_some`."""
    (count, inputs), outputs = x.shape, codes.shape[0]
    constants = geometry(grid, inputs)
    units, size, high = constants["UNITS"], constants["UNIT"], constants["HIGH"]
    across = units * size * high // 32
    x = x.reshape(count, units, 16 // high, -1, 2).permute(0, 2, 4, 1, 3).contiguous()  # in the order of codes in words
    blocks = -(-outputs // OUTER)
    split = max(1, min(PROGRAMS // blocks, across // 64))
    steps = -(-across // split // STEP)
    split = -(-across // (steps * STEP))
    kind = x.dtype if split == 1 else torch.float32
    out = torch.empty(split, count, outputs, dtype=kind, device=x.device)
    tensors = x, codes, scales, zeros, power, bias if split == 1 else None, out
    key = ("product", grid, x.dtype, outputs, inputs, split, x.device, _kinds(tensors))
    with device_of(x):
        _product(
            key, blocks * split,
            (*tensors, outputs, count, triton_words.MAGIC, *constants.values(), SOME, OUTER, STEP, split, steps,
             INTERPRETED),
            warps=WARPS,
        )  # fmt: skip
    if split == 1:
        return out[0]
    total = out.sum(dim=0)
    return (total if bias is None else total + bias).to(x.dtype)


def values(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    grid: Grid,
    *,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values [outputs, inputs] of packed codes int32 [outputs, words], as `rounding.dequantize` rounds them, in one pass."""
    outputs = codes.shape[0]
    out = torch.empty(outputs, inputs, dtype=dtype, device=codes.device)
    tensors = codes, scales, zeros, power, out
    key = ("values", grid, dtype, outputs, inputs, codes.device, _kinds(tensors))
    if dtype in SHORT and words.has_one_scale(grid, inputs) and inputs % words.unit(grid, inputs) == 0:
        tile = TILE * words.PLANES[grid.element.bits][0] // 16
        across = -(-inputs // 2 // TILE)
        with device_of(codes):
            _decode(
                key, -(-outputs // 4) * across,
                (*tensors[:4], out.view(torch.int32), outputs, triton_words.MAGIC, *geometry(grid, inputs).values(),
                 SHORT[dtype], 4, tile, INTERPRETED), warps=4,
            )  # fmt: skip
        return out
    with device_of(codes):
        across = -(-inputs // 512)
        _values(
            key, -(-outputs // 16) * across,
            (*tensors, outputs, triton_words.MAGIC, *geometry(grid, inputs).values(), 16, 256, INTERPRETED), warps=4,
        )  # fmt: skip
    return out


def laid(plain: Laid) -> Laid:
    """`plain`, in the layout `bytes`, in the layout `words`; scales are on the grid of bfloat16."""
    grid, (outputs, inputs) = plain.grid, plain.shape
    unit, bits = words.unit(grid, inputs), grid.element.bits
    units, stride = -(-inputs // unit), words.count(bits, inputs, unit)
    offset = -grid.element.lowest if plain.codes.dtype == torch.int8 else 0
    packed = torch.empty(outputs, stride, dtype=torch.int32, device=plain.codes.device)
    below, begin = bits, 0
    with device_of(packed):
        for width in words.PLANES[bits]:
            below -= width
            across = -(-units * unit * width // 32 // 128)
            triton_unpack.pack[(-(-outputs // 4), across)](
                plain.codes, packed[:, begin:], outputs, inputs, offset, width, below, unit, units, stride, 4, 128
            )
            begin += units * unit * width // 32
    scales = plain.scales.to(torch.bfloat16) if grid.element.kind == "integer" else plain.scales
    return Laid(packed, scales, plain.zeros, plain.tensor_scale, grid, plain.dtype, plain.shape)


def codes_product(x: Tensor, codes: Tensor, zeros: Tensor | None) -> Tensor:
    """The product of codes of both sides, x [rows, inputs] and codes [outputs, inputs], with up to `FEW` rows.

    Of int8, less int8 zero points [rows] of x: int32, exact. Of e4m3 as bytes: float32. Inputs are a multiple of 4.
    """
    integer = codes.dtype == torch.int8
    (count, inputs), outputs = x.shape, codes.shape[0]
    out = torch.empty(count, outputs, dtype=torch.int32 if integer else torch.float32, device=x.device)
    rows = 1 << (count - 1).bit_length()
    tensors = x.contiguous().view(torch.int32), codes.view(torch.int32), zeros, out
    key = ("codes", integer, outputs, inputs, rows, x.device, _kinds(tensors))
    outer = max(1, 4 // rows)
    with device_of(x):
        _codes(
            key, -(-outputs // outer), (*tensors, outputs, count, inputs, integer, rows, outer, 512), warps=4
        )  # fmt: skip
    return out


def _kinds(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """All of tensors that a compiled kernel depends on: types, and alignments."""
    return tuple([None if one is None else (one.dtype, one.data_ptr() % ALIGNED == 0) for one in tensors])


_multiply, _codes = Kernel(triton_words.matvec), Kernel(triton_words.codes_product)
_values, _decode, _product = Kernel(triton_unpack.decode), Kernel(triton_tiles.decode), Kernel(triton_tiles.product)
