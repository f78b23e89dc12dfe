"""Weights of packed integers: GPTQ, AWQ, compressed-tensors and ModelOpt, with zero points and groups in any order.

Read off GPTQModel 7 and AutoGPTQ 0.7 (`qlinear`), AutoAWQ 0.2 (`packing_utils`, `gemv`), compressed-tensors 0.20 and
ModelOpt 0.47.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.element import ELEMENTS, Element
from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors, check
from qkit.reference import packing
from qkit.sources.law import Codes

AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  #: by column of eight, the place of its code in the word


class Grouped:
    """The common part of forms whose groups lie along rows, and whose scales are a part called `scales`."""

    __slots__ = ()
    group: int

    @property
    def block(self) -> tuple[int, int]:
        """See `Form`."""
        return 1, self.group

    @property
    def scales_in(self) -> str:
        """See `Form`."""
        return "scales"


@dataclass(frozen=True, slots=True)
class Gptq(Grouped):
    """GPTQ: codes packed down the inputs, [inputs * bits / 32, outputs], zero points along the outputs.

    Attributes:
        bits: of a code.
        group: inputs that share a scale.
        ordered: whether groups are contiguous; otherwise `g_idx` has the group of each input.
        less_one: whether the file stores zero points less one, as version 1 does.
    """

    bits: int
    group: int
    ordered: bool
    less_one: bool

    @property
    def name(self) -> str:
        """See `Form`."""
        order = "" if self.ordered else ", groups in the order of activations"
        return f"GPTQ, {self.bits} bits, groups of {self.group}{order}"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        n = parts["qweight"].shape[0] * 32 // self.bits
        columns = np.ascontiguousarray(parts["qweight"][:, rows].T).view(np.uint32)
        zeros = _packed_zeros(parts["qzeros"], self.bits, parts["scales"].shape[1])
        if self.less_one:
            top = (1 << self.bits) - 1
            if count := int((zeros == top).sum()):
                raise ArtifactError(
                    f"{count} zero points are stored as {top}, which readers of GPTQ's first version take for 0 or for "
                    f"{top + 1}: convert the model to gptq_v2 with the program that wrote it"
                )
            zeros = zeros + np.uint8(1)
        return Codes(
            f"int{self.bits}",
            packing.unpack(columns, self.bits, n),
            np.ascontiguousarray(parts["scales"][:, rows].T),
            (1, self.group),
            zeros=np.ascontiguousarray(zeros[:, rows].T),
            groups=None if self.ordered else np.asarray(parts["g_idx"], np.int64),
        )


@dataclass(frozen=True, slots=True)
class Awq(Grouped):
    """AWQ's `gemm` version: codes packed along the outputs, [inputs, outputs / 8], eight to a word in AWQ's order."""

    group: int

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"AWQ, 4 bits, groups of {self.group}"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        outputs = parts["scales"].shape[1]
        begin, stop, step = rows.indices(outputs)
        first, last = begin // 8, -(-stop // 8)
        some = slice(begin - first * 8, stop - first * 8, step)
        return Codes(
            "int4",
            np.ascontiguousarray(_in_order(parts["qweight"][:, first:last])[:, some].T),
            np.ascontiguousarray(parts["scales"][:, rows].T),
            (1, self.group),
            zeros=np.ascontiguousarray(_in_order(parts["qzeros"][:, first:last])[:, some].T),
        )


@dataclass(frozen=True, slots=True)
class AwqRows(Grouped):
    """AWQ's `gemv` version: codes packed along the inputs in plain order, [outputs, inputs / 8]; its other parts are padded."""

    group: int

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"AWQ gemv, 4 bits, groups of {self.group}"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        words = np.ascontiguousarray(parts["qweight"][rows]).view(np.uint32)
        n = 8 * words.shape[1]
        groups = n // self.group
        return Codes(
            "int4",
            packing.unpack(words, 4, n),
            np.ascontiguousarray(parts["scales"][rows, :groups]),
            (1, self.group),
            zeros=packing.unpack(
                np.ascontiguousarray(parts["qzeros"][rows, : -(-groups // 8)]).view(np.uint32), 4, groups
            ),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """compressed-tensors' integers: a stream of bits for each row, or a byte for each code.

    Attributes:
        bits: of a code.
        block: rows and columns that share a scale.
        bytes_each: whether a code has a byte of its own.
        asymmetric: whether there are zero points.
        ordered: whether groups are contiguous; otherwise `weight_g_idx` has the group of each input.
    """

    bits: int
    block: tuple[int, int]
    bytes_each: bool
    asymmetric: bool
    ordered: bool = True

    @property
    def name(self) -> str:
        """See `Form`."""
        layout = "int-quantized" if self.bytes_each else "pack-quantized"
        zeros = " with zero points" if self.asymmetric else ""
        order = "" if self.ordered else ", groups in the order of activations"
        return f"compressed-tensors {layout}, {self.bits} bits{zeros}{order}"

    @property
    def scales_in(self) -> str:
        """See `Form`."""
        return "weight_scale"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        element, scales = ELEMENTS[f"int{self.bits}"], parts["weight_scale"]
        if self.bytes_each:
            signed = _inside(parts["weight"][rows], element, "weight")
        else:
            n = int(parts["weight_shape"][-1])
            words = np.ascontiguousarray(parts["weight_packed"][rows]).view(np.uint32)
            signed = packing.signed(packing.unpack(words, self.bits, n), element)
        begin, stop, step = rows.indices(len(parts["weight"] if self.bytes_each else parts["weight_packed"]))
        scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
        zeros = self._zeros(parts, scales.shape) if self.asymmetric else None
        if scales.shape[0] > 1:
            mine = np.arange(begin, stop, step) // self.block[0]
            scales, zeros = scales[mine], None if zeros is None else zeros[mine]
        return Codes(
            element.name,
            packing.unsigned(signed, element) if self.asymmetric else signed,
            scales,
            (1, self.block[1]),
            zeros=zeros,
            groups=None if self.ordered else np.asarray(parts["weight_g_idx"], np.int64),
        )

    def _zeros(self, parts: Tensors, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        stored, element = parts["weight_zero_point"], ELEMENTS[f"int{self.bits}"]
        if stored.dtype.name != "int32":
            return packing.unsigned(_inside(stored.reshape(shape), element, "weight_zero_point"), element)
        words = np.ascontiguousarray(stored.T).view(np.uint32)
        return np.ascontiguousarray(packing.unpack(words, self.bits, shape[0]).T)


@dataclass(frozen=True, slots=True)
class Signed:
    """ModelOpt's integers, with a sign: a byte for each code, or of 4 bits two rows in each byte, the first in the low bits.

    Attributes:
        title: of the layout.
        bits: of a code, 8 or 4.
        block: rows and columns that share a scale.
        stacked: whether the tensors have one matrix for each expert.
    """

    title: str
    bits: int
    block: tuple[int, int]
    stacked: bool = False

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"{self.title}, int{self.bits}, {'a scale for each row' if self.bits == 8 else f'groups of {self.block[1]}'}"

    @property
    def scales_in(self) -> str:
        """See `Form`."""
        return "scales"

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        stored, scales = (parts[name][matrix] if self.stacked else parts[name] for name in ("codes", "scales"))
        count = len(stored) * 8 // self.bits
        begin, stop, step = rows.indices(count)
        wanted = np.arange(begin, stop, step)
        if self.bits == 8:
            found = np.ascontiguousarray(stored[begin:stop:step]).view(np.int8)
        else:
            both = stored[wanted // 2].view(np.uint8)
            halves = np.where((wanted % 2 == 0)[:, None], both & np.uint8(15), both >> np.uint8(4))
            found = ((halves ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.int8)
        scales = scales.reshape(1 if self.block[0] == count else count, -1)
        return Codes(f"int{self.bits}", found, scales if len(scales) == 1 else scales[wanted], (1, self.block[1]))


def _inside(stored: NDArray[Any], element: Element, name: str) -> NDArray[Any]:
    """`stored`, numbers with a byte each, which have to be codes of `element` with its sign."""
    check((stored >= element.lowest) & (stored <= element.highest), name, f"a code of {element}")
    return stored


def is_contiguous(g_idx: NDArray[Any], group: int) -> bool:
    """Whether `g_idx` says no more than that every `group` inputs share a scale. -1 for all inputs says that too."""
    return bool((g_idx < 0).all() or np.array_equal(g_idx, np.arange(g_idx.size) // group))


def _packed_zeros(stored: NDArray[Any], bits: int, outputs: int) -> NDArray[np.uint8]:
    return packing.unpack(np.ascontiguousarray(stored).view(np.uint32), bits, outputs)


def _in_order(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Codes [rows, 8 * words] in the order of the outputs."""
    plain = packing.unpack(np.ascontiguousarray(words).view(np.uint32), 4, 8 * words.shape[1])
    return plain.reshape(*words.shape, 8)[..., list(AWQ_PLACES)].reshape(words.shape[0], -1)
