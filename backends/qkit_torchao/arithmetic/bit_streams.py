"""Codes of 2 to 8 bits as canonical words in torch: `reference.packing`, on any device."""

import torch
from torch import Tensor

from qkit.element import Element
from qkit_torchao.arithmetic.packing import unshift

WORD_BITS = 32
TOGETHER = {1: torch.int8, 2: torch.int16, 4: torch.int32}  #: a type of so many bytes


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
    bits, signed = element.bits, element.kind == "integer" and symmetric
    if 8 % bits == 0:  # a table with the codes of every byte: faster on a CPU than shifts of each code
        shifts = torch.arange(0, 8, bits, device=words.device)
        table = torch.arange(256, device=words.device)[:, None] >> shifts & ((1 << bits) - 1)
        table = (table + element.lowest).to(torch.int8) if signed else table.to(torch.uint8)
        joined = table.view(TOGETHER[8 // bits]).flatten()
        found = joined.index_select(0, words.contiguous().view(torch.uint8).flatten().to(torch.int32))
        return found.view(table.dtype).reshape(*words.shape[:-1], -1)[..., :n]
    first, shift = _places(n, bits, words.device)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.cat([wide, torch.zeros_like(wide[..., :1])], dim=-1)
    codes = (wide[..., first] | wide[..., first + 1] << WORD_BITS) >> shift & ((1 << bits) - 1)
    return (codes + element.lowest).to(torch.int8) if signed else codes.to(torch.uint8)


def _places(n: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The word in which each code begins, and its first bit there."""
    begin = torch.arange(n, device=device) * bits
    return begin // WORD_BITS, begin % WORD_BITS
