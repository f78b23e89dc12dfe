"""The layout `words`: codes of any width without gaps, in 32-bit words that the kernels of `kernels.triton_words` multiply.

A code of 3, 5 or 6 bits lies in two planes: its high bits in the first, its low bits in the second. In a plane of b bits, a unit
of U columns is U b / 32 words; code i of word w is column 2 W (i // 2) + 2 w + i % 2 of its unit, at bit b i, for W words a unit.
A row is its words of the first plane, then those of the second. Columns are padded to whole units, with code 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid

PLANES = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    8: (8,),
}  #: widths of the planes of a code, high bits first
LONGEST = 128  #: columns of the longest unit
SHORTEST = 32  #: of the shortest whose planes are whole words, whatever their width; 16 do for four bits and more


def unit(grid: Grid, inputs: int) -> int:
    """Columns of a unit of rows of `inputs`: where it can be, a divisor of a group, so that a word has one scale."""
    group = grid.group if isinstance(grid.group, int) else inputs
    size = min(LONGEST, group & -group)
    least = SHORTEST // 2 if min(PLANES[grid.element.bits]) > 1 else SHORTEST
    return size if size >= least else SHORTEST


def has_one_scale(grid: Grid, inputs: int) -> bool:
    """Whether each unit lies in one group."""
    return not isinstance(grid.group, int) or grid.group % unit(grid, inputs) == 0


def count(bits: int, inputs: int, size: int) -> int:
    """Words of a row of `inputs` codes, in units of `size`."""
    return -(-inputs // size) * size * bits // 32


def pack(codes: Tensor, bits: int, size: int) -> Tensor:
    """Codes uint8 [..., inputs], from 0 to 2^bits - 1 -> int32 [..., words], in units of `size`."""
    padded = F.pad(codes, (0, -codes.shape[-1] % size))
    planes, above = [], bits
    for width in PLANES[bits]:
        above -= width
        part = padded >> above & (1 << width) - 1
        planes.append(_plane(part, width, size))
    return torch.cat(planes, dim=-1)


def unpack(words: Tensor, bits: int, size: int, inputs: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., inputs]."""
    units = -(-inputs // size)
    codes = torch.zeros(*words.shape[:-1], units * size, dtype=torch.uint8, device=words.device)
    planes = words.split([units * size * width // 32 for width in PLANES[bits]], dim=-1)
    for width, plane in zip(PLANES[bits], planes, strict=True):
        codes = codes << width | _codes(plane, width, size)
    return codes[..., :inputs].contiguous()


def _plane(part: Tensor, width: int, size: int) -> Tensor:
    """Codes of `width` bits [..., columns] -> int32 [..., words]."""
    each = 32 // width
    parts = part.unflatten(-1, (-1, each // 2, size // each, 2))  # unit, pair of codes, word, code of the pair
    words = torch.zeros(*part.shape[:-1], parts.shape[-4], size // each, dtype=torch.int32, device=part.device)
    for i in range(each):
        words |= parts[..., i // 2, :, i % 2].to(torch.int32) << width * i
    return words.flatten(-2)


def _codes(plane: Tensor, width: int, size: int) -> Tensor:
    """The inverse of `_plane`."""
    each = 32 // width
    words = plane.unflatten(-1, (-1, size // each))
    parts = [(words >> width * i & (1 << width) - 1).to(torch.uint8) for i in range(each)]
    pairs = [torch.stack(parts[i : i + 2], dim=-1) for i in range(0, each, 2)]  # [..., unit, word, 2]
    return torch.stack(pairs, dim=-3).flatten(-4)
