"""Codes of 2 to 8 bits as canonical words in torch: `reference.packing`, on any device."""

import torch
from torch import Tensor

from qkit.element import Element
from qkit_torchao.arithmetic.packing import unshift

WORD_BITS = 32


def pack(codes: Tensor, element: Element) -> Tensor:
    """Codes [..., n], int8 for symmetric integers, else uint8 -> int32 words [..., words(n, bits)]: `packing.packed_codes`."""
    bits, n = element.bits, codes.shape[-1]
    unsigned = (unshift(codes, element) if codes.dtype == torch.int8 else codes).to(torch.int64)
    count = -(-n * bits // WORD_BITS)
    first, shift = _places(n, bits, codes.device)
    out = torch.zeros((*codes.shape[:-1], count + 1), dtype=torch.int64, device=codes.device)
    wide = unsigned << shift
    out.index_add_(-1, first, wide & 0xFFFFFFFF)
    out.index_add_(-1, first + 1, wide >> WORD_BITS)
    return out[..., :count].to(torch.int32)


def unpack(words: Tensor, element: Element, n: int, *, symmetric: bool) -> Tensor:
    """The inverse of `pack`: codes [..., n]."""
    bits = element.bits
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (words.contiguous().view(torch.uint8)[..., None] >> shifts & ((1 << bits) - 1)).flatten(-2)[..., :n]
    else:
        first, shift = _places(n, bits, words.device)
        wide = words.to(torch.int64) & 0xFFFFFFFF
        wide = torch.cat([wide, torch.zeros_like(wide[..., :1])], dim=-1)
        codes = ((wide[..., first] | wide[..., first + 1] << WORD_BITS) >> shift & ((1 << bits) - 1)).to(torch.uint8)
    if element.kind == "integer" and symmetric:
        return (codes.to(torch.int16) + element.lowest).to(torch.int8)
    return codes


def _places(n: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The word in which each code begins, and its first bit there."""
    begin = torch.arange(n, device=device) * bits
    return begin // WORD_BITS, begin % WORD_BITS
