"""Launches of the kernels over packed codes, see `arithmetic.words`: products with few rows, values, packing. On CUDA.

Rows of x are float32, bfloat16 or float16. Sums are in float32; the output is rounded once.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkit.exactness import is_exact
from qkit.grid import Grid
from qkit_torchao.arithmetic import words
from qkit_torchao.arithmetic.packing import Laid
from qkit_torchao.kernels import nvrtc, triton_tiles, triton_unpack, triton_words
from qkit_torchao.kernels.cuda import INTERPRETED, device_of
from qkit_torchao.kernels.geometry import Constants, geometry, kept, product_geometry, rows_of_few
from qkit_torchao.kernels.launches import Kernel

FEW = 4  #: the most rows of codes that are multiplied by codes: torch's products take more
MOST = 64  #: the most rows that are multiplied without decoding: more pay for the values of the weight
EIGHT = 8  #: rows that an instruction of tensor cores takes, and the most of float32
ACROSS = 1024  #: outputs of a row that a program scales
TILE = 1024  #: pairs of columns of a row that a program decodes
SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  #: types of 16 bits
ALIGNED = 16  #: bytes that are read at once
#: By number, as `codes.cuh` has them: types of x, and of scales.
KINDS_OF_X = (torch.bfloat16, torch.float16, torch.float32)
KINDS = (torch.bfloat16, "e8m0", "e4m3", torch.float32, torch.float16, "any e8m0", "e4m3 times", "e4m3 over")


def why_not_multiplies(device: torch.device) -> str:
    """Why `multiply` cannot be compiled for `device`, and the way out; empty where it can."""
    return nvrtc.why_not(device)


def multiplies(x: Tensor) -> bool:
    """Whether `multiply` takes x [rows, inputs]."""
    return 0 < len(x) <= (MOST if x.dtype in SHORT else EIGHT) and not is_exact() and not why_not_multiplies(x.device)


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, power: Tensor | None, biases: Tensor | None,
    bias: Tensor | None, grid: Grid, *, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [rows, inputs] times packed codes -> [rows, outputs], for grids and widths that `choose.why_not_few` accepts.

    Rows of 16 bits are multiplied on tensor cores by values that are rounded to their type, as `values` rounds them; those of
    float32, and one or two of bfloat16, by exact ones.

    Args:
        codes, scales, zeros, power, biases: of a converted layer, in the layout `words`: codes int32 [outputs, words].
        bias: [outputs], of the type of x.
        experts: integers [rows]: then codes are [experts, outputs, words], as are the others, and row r is
            multiplied by those of `experts[r]`. That is the grouped product of a mixture of experts for few tokens: repeat a
            token for each of its experts. For many tokens of an expert, see `values` of `codes[expert]`.
    """
    (count, inputs), outputs, stride = x.shape, codes.shape[-2], codes.shape[-1]
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    if experts is not None:
        experts = experts.to(torch.int64)
    x = x.contiguous()
    aligned = x.data_ptr() % ALIGNED == 0 and codes.data_ptr() % ALIGNED == 0
    one = experts is not None or x.dtype == torch.float32  # eight rows at a time
    eights = 1 if one else 1 << max(0, (count - 1) // EIGHT).bit_length()
    each = 1 if experts is not None else count  # rows of a program
    few = x.dtype == torch.bfloat16 and each <= rows_of_few(grid, inputs)
    constants, numbers, shared = product_geometry(
        grid, inputs, outputs, stride, 0 if few else eights, aligned, processors_of(x.device), each if few else 0
    )
    scaled = KINDS.index(geometry(grid, inputs)["SCALES"] if scales.dtype == torch.uint8 else scales.dtype)
    rows = count if experts is not None else -(-count // (EIGHT * eights))
    more = 0 if biases is None else KINDS.index(biases.dtype) + 1
    first = ("XS", KINDS_OF_X.index(x.dtype)), ("SCALES", scaled), ("ZEROS", zeros is not None), ("BIASES", more)
    with device_of(x):
        if eights > 1:
            x = _arranged(x, (*first, *constants), shared, numbers[0], rows)
        tensors = x, codes, scales, zeros, power, biases, bias, out, experts
        addresses = [0 if one is None else one.data_ptr() for one in tensors]
        powers = int(power is not None and power.numel() > 1)
        (FEW_ROWS if few else PRODUCT)(
            (*first, *constants), (-(-outputs // shared["outputs"]), rows), shared["threads"],
            (*addresses, outputs, inputs, count, *numbers, powers),
            memory=kept(grid, inputs, each) if ("KEEPS", 1) in constants else 0,
        )  # fmt: skip
    return out


def _arranged(x: Tensor, constants: Constants, shared: dict[str, int], across: int, rows: int) -> Tensor:
    """x in the order in which lanes read it; `across` is the number of words of a row, and `rows` that of programs."""
    count, inputs = x.shape
    known = dict(constants)
    whole = rows * -(-across // 16) * known["EIGHTS"] * 32  # lanes, each with registers for the pairs of four words
    out = torch.empty(whole * 8 * (16 // known["HIGH"]), dtype=x.dtype, device=x.device)
    programs = -(-whole // shared["threads"])
    ARRANGEMENT(
        constants, (programs, 1), shared["threads"], (x.data_ptr(), out.data_ptr(), inputs, count, across, whole)
    )
    return out


@cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def values(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    biases: Tensor | None,
    grid: Grid,
    *,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values [outputs, inputs] of packed codes int32 [outputs, words], as `rounding.dequantize` rounds them, in one pass."""
    outputs = codes.shape[0]
    out = torch.empty(outputs, inputs, dtype=dtype, device=codes.device)
    tensors = codes, scales, zeros, power, biases, out
    key = ("values", grid, dtype, outputs, inputs, codes.device, _kinds(tensors))
    if dtype in SHORT and words.has_one_scale(grid, inputs) and inputs % words.unit(grid, inputs) == 0:
        tile = TILE * words.PLANES[grid.element.bits][0] // 16
        across = -(-inputs // 2 // TILE)
        with device_of(codes):
            _decode(
                key, -(-outputs // 4) * across,
                (*tensors[:5], out.view(torch.int32), outputs, triton_words.MAGIC, *geometry(grid, inputs).values(),
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


def scaled(product: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """product [rows, outputs] * steps [rows, 1] * scales [outputs or 1] + bias, in float32 and in that order, as `dtype`."""
    rows, outputs = product.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=product.device)
    tensors = product.contiguous(), steps.contiguous(), scales.contiguous(), bias, out
    key = ("scaled", scales.numel() == 1, product.device, _kinds(tensors))
    with device_of(product):
        _scaled(
            key, rows * -(-outputs // ACROSS), (*tensors, outputs, scales.numel() == 1, ACROSS, INTERPRETED), warps=4
        )  # fmt: skip
    return out


def _kinds(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """All of tensors that a compiled kernel depends on: types, and alignments."""
    return tuple([None if one is None else (one.dtype, one.data_ptr() % ALIGNED == 0) for one in tensors])


PRODUCT = nvrtc.Kernel("products.cu", "multiply", (nvrtc.POINTER,) * 9 + (nvrtc.NUMBER,) * 7, early=True)
FEW_ROWS = nvrtc.Kernel("few.cu", "multiply_few", PRODUCT.kinds, early=True)
ARRANGEMENT = nvrtc.Kernel("products.cu", "arrange", (nvrtc.POINTER,) * 2 + (nvrtc.NUMBER,) * 4)
_codes, _scaled = Kernel(triton_words.codes_product), Kernel(triton_words.scaled)
_values, _decode = Kernel(triton_unpack.decode), Kernel(triton_tiles.decode)
