"""Codes of another program as weights on grids: on qkit's own rules where those have such scales, else on read grids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import ELEMENTS
from qkit.errors import ArtifactError, GridError
from qkit.experts import Member
from qkit.formats.packed import check, pack
from qkit.formats.read_layout import FINITE
from qkit.grid import Grid, Group
from qkit.qtensor import DType, QTensor
from qkit.reference.packing import Packed
from qkit.sources.encoded import Encoded, Valued
from qkit.sources.law import NAN, Codes
from qkit.storage.read import Stored

MX_GROUP = 32  #: codes that share an E8M0 scale in MXFP4 and MXFP8


def grid_of(encoded: Encoded) -> Grid | None:
    """The grid that holds the codes of `encoded` as they are.

    None where groups have several rows, are not contiguous, or have a size that no grid has.
    """
    form = encoded.form
    if isinstance(form, Valued):
        return None
    rows, n = encoded.matrix
    sample = encoded.codes(slice(0, 1))
    down, along = (min(one, size) for one, size in zip(form.block, (rows, n), strict=True))
    if sample.groups is not None or (down != 1 and (down, along) != (rows, n)):
        return None
    group: Group = along
    if along == n:
        group = "row" if down == 1 else "tensor"
    elif n % along:
        return None
    try:
        return Grid(sample.element, group, _rule(sample, encoded.parts[form.scales_in], group))
    except GridError:  # such as NVFP4's scales for 32 codes
        return None


def packed_weight(encoded: Encoded, grid: Grid, dtype: DType, *, rows: slice = slice(None), matrix: int = 0) -> Packed:
    """The weight of some rows of `encoded` on `grid`, with the scales of the file.

    Raises:
        ArtifactError: a scale or a code is no finite number.
    """
    found = encoded.codes(rows, matrix)
    element, kind = ELEMENTS[found.element], found.scales.dtype.name
    scales = found.scales
    if grid.stored_scales == "float":
        check(np.isfinite(scales.astype(np.float32)), "the scales", "finite")
    else:
        scales = scales.view(np.uint8)
        check(scales != NAN if kind != "float8_e4m3fn" else scales & 0x7F != 0x7F, "the scales", "finite")
    if element.name in FINITE:
        mask, last = FINITE[element.name]
        magnitudes = found.codes & np.uint8(mask)
        check(magnitudes < last if element.name == "e4m3" else magnitudes <= last, "the codes", f"a finite {element}")
    more: dict[str, Any] = {}
    if grid.has_zeros:
        assert found.zeros is not None
        check(found.zeros <= element.levels, "the zero points", f"one of {element.bits} bits")
        more["zeros"] = found.zeros
    if grid.has_biases:
        assert found.offsets is not None
        check(np.isfinite(found.offsets.astype(np.float32)), "the biases", "finite")
        more["biases"] = found.offsets
    if grid.has_tensor_scale:
        factor = found.divisor if found.divisor is not None else found.tensor_scale
        more["tensor_scale"] = np.asarray(1 if factor is None else factor, np.float32)
        if not np.isfinite(more["tensor_scale"]) or more["tensor_scale"] == 0:
            name = getattr(encoded.form, "factor", "the scale of the tensor")
            raise ArtifactError(f"{name} is {float(more['tensor_scale'])}: want a finite number other than 0")
    contiguous = {name: np.ascontiguousarray(array) for name, array in more.items()}
    contiguous.update((name, more[name]) for name in more if more[name].ndim == 0)
    return pack(QTensor(np.ascontiguousarray(found.codes), np.ascontiguousarray(scales), grid, dtype, **contiguous))


def member_rows(member: Member, projection: str) -> slice:
    """The rows of one projection among the codes [outputs, inputs] of an expert in a stack."""
    place, parts = member.projections.index(projection), len(member.projections)
    if member.interleaved:
        return slice(place, parts * member.shape[0], parts)
    return slice(place * member.shape[0], (place + 1) * member.shape[0])


def _rule(sample: Codes, scales: Stored, group: Group) -> str:
    if sample.offsets is not None:
        return "affine"
    if sample.element.startswith("int"):
        return "stored" if sample.zeros is None else "stored-zeros"
    kind = sample.scales.dtype.name
    if kind == "float8_e4m3fn":
        return "stored-nvfp4" if sample.divisor is None else "stored-nvfp4-inverse"
    if kind not in ("uint8", "float8_e8m0fnu"):
        return "stored"
    stored: NDArray[Any] = scales.mapped()
    own = group == MX_GROUP or (sample.element == "e4m3" and not isinstance(group, int))  # files have a place for these
    return "rceil" if own and (stored.view(np.uint8) > 0).all() else "stored-e8m0"
