"""`qkit/reference/packing.py` in MLX: canonical packed words, which are also MLX's own. Arrays only; works under `mx.compile`.

Shifts are arrays, not numbers. `mx.compile` (0.32.4) names its kernels after the constants in them, without a separator:
`(x >> 26) & 3` and `(x >> 2) & 63` would get one kernel.
"""

import mlx.core as mx

from qkit.element import Element
from qkit.reference.packing import WORD_BITS, words


def unsigned(codes: mx.array, element: Element) -> mx.array:
    """Signed integer codes -2^(bits-1) .. 2^(bits-1)-1 shifted to 0 .. 2^bits-1; unsigned codes stay as they are."""
    if codes.dtype != mx.int8:
        return codes
    return (codes.astype(mx.int32) - element.lowest).astype(mx.uint8)


def signed(codes: mx.array, element: Element) -> mx.array:
    """The inverse of `unsigned`: 0 .. 2^bits-1 shifted to -2^(bits-1) .. 2^(bits-1)-1."""
    return (codes.astype(mx.int32) + element.lowest).astype(mx.int8)


def pack(codes: mx.array, bits: int) -> mx.array:
    """uint8 codes [..., n], each below 2^bits -> packed words, uint32 [..., words(n, bits)]; the tail is zeros."""
    *rows, n = codes.shape
    blocks = _padded(codes, WORD_BITS).reshape(*rows, -1, WORD_BITS).astype(mx.uint32)  # 32 codes fill `bits` words
    _, shift = _places(bits)
    low, high = blocks << shift, (blocks >> 1) >> (WORD_BITS - 1 - shift)  # `high`: bits of the next word
    stream: list[mx.array] = []
    for word in range(bits):
        first, after = -(-word * WORD_BITS // bits), -(-(word + 1) * WORD_BITS // bits)  # codes that begin in this word
        begun = low[..., first:after].sum(axis=-1)  # they share no bit, so a sum joins them
        stream.append(begun + high[..., first - 1] if word else begun)
    return mx.stack(stream, axis=-1).reshape(*rows, -1)[..., : words(n, bits)]


def unpack(packed: mx.array, bits: int, n: int) -> mx.array:
    """Packed words, uint32 [..., words(n, bits)] -> uint8 codes [..., n]."""
    rows = packed.shape[:-1]
    blocks = _padded(packed, bits).reshape(*rows, -1, bits)
    word, shift = _places(bits)
    low = mx.take(blocks, word, axis=-1) >> shift
    high = (mx.take(blocks, mx.minimum(word + 1, bits - 1), axis=-1) << 1) << (WORD_BITS - 1 - shift)
    codes = ((low | high) & ((1 << bits) - 1)).astype(mx.uint8)
    return codes.reshape(*rows, -1)[..., :n]


def packed_codes(codes: mx.array, element: Element) -> mx.array:
    """Codes [..., n] as canonical packed words, uint32 [..., words(n, bits)]."""
    return pack(unsigned(codes, element), element.bits)


def unpacked_codes(packed: mx.array, *, element: Element, n: int, symmetric: bool) -> mx.array:
    """The inverse of `packed_codes`: int8 for symmetric integers, else uint8."""
    codes = unpack(packed, element.bits, n)
    return signed(codes, element) if element.kind == "integer" and symmetric else codes


def _places(bits: int) -> tuple[mx.array, mx.array]:
    """The word in which each of 32 codes begins, and the bit of it; both uint32 [32]."""
    places = [divmod(i * bits, WORD_BITS) for i in range(WORD_BITS)]
    return mx.array([word for word, _ in places], mx.uint32), mx.array([shift for _, shift in places], mx.uint32)


def _padded(x: mx.array, multiple: int) -> mx.array:
    missing = -x.shape[-1] % multiple
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
