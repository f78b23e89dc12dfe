"""How artifacts store weights on read grids: by compressed-tensors' own formats where those can state them, else by qkit's.

Scales keep the type that they have in the file. `OWN` is a format that only qkit opens: `weight_packed` is the stream of bits of
each row, `weight_biases` are the floats of `affine`, and `weight_global_scale` is the scale of the tensor.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors, as_bytes, as_words, check, check_parts, pack, unpack
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType, QTensor
from qkit.reference import packing
from qkit.reference.packing import Packed

OWN: Final = "qkit-stored"
PACKED, BYTES = "pack-quantized", "int-quantized"  #: integers: as a stream of bits, or a byte for each code
MX: Final[dict[tuple[str, Any], str]] = {("e2m1", 32): "mxfp4-pack-quantized", ("e4m3", 32): "mxfp8-quantized"}
FINITE: Final = {
    "e4m3": (0x7F, 0x7F),
    "e5m2": (0x7F, 0x7B),
}  #: by element: the bits of a magnitude, and the last finite one


def layout(grid: Grid) -> str:
    """The format of weights on `grid`: compressed-tensors' name for it, or `OWN`."""
    if grid.element.kind == "integer" and not grid.has_biases:
        return PACKED
    if grid.scale == "stored-e8m0":
        return MX.get((grid.element.name, grid.group), OWN)
    if grid.scale == "stored-nvfp4-inverse":
        return "nvfp4-pack-quantized"
    return "float-quantized" if (grid.element.name, grid.scale) == ("e4m3", "stored") else OWN


def store(packed: Packed, form: str) -> Tensors:
    """The named arrays of one packed weight on a read grid. Codes are views, but for `int-quantized`.

    Raises:
        ArtifactError: a zero point has more bits than the format stores.
    """
    import ml_dtypes  # here, so that `import qkit` stays cheap

    grid, inputs = packed.grid, packed.shape[-1]
    bits = grid.element.bits
    scales = packed.scales.reshape(-1) if grid.group == "tensor" else packed.scales
    if form == BYTES:
        return {"weight": unpack(packed).codes, "weight_scale": scales}
    shape = np.array(packed.shape, np.int64)
    if form in (PACKED, OWN):
        out = {"weight_packed": packed.words.view(np.int32), "weight_scale": scales, "weight_shape": shape}
        if packed.zeros is not None and form == PACKED:
            check(packed.zeros <= grid.element.levels, "the zero points", f"one of {bits} bits, as {form} stores them")
            out["weight_zero_point"] = _packed_zeros(packed.zeros, grid)
        if packed.biases is not None:
            out["weight_biases"] = packed.biases
        if packed.tensor_scale is not None:
            out["weight_global_scale"] = packed.tensor_scale.reshape(1)
        return out
    codes = as_bytes(packed.words, width=inputs * bits // 8)
    if form == "nvfp4-pack-quantized":
        assert packed.tensor_scale is not None
        blocks = scales.view(ml_dtypes.float8_e4m3fn)
        return {"weight_packed": codes, "weight_scale": blocks, "weight_global_scale": packed.tensor_scale.reshape(1)}
    if form == "mxfp4-pack-quantized":
        return {"weight_packed": codes, "weight_scale": scales}
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": scales}


def restore(
    tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...], form: str
) -> Packed:
    """The inverse of `store`, for a weight of `shape` on a read grid.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape than the format, or has a value that is no code or scale.
    """
    expected = contents(grid, shape=shape, form=form, kind=scale_type(tensors))
    check_parts(dict(tensors), expected, form, grid)
    scale_shape, codes = grid.scale_shape(shape), tensors.get("weight_packed", tensors.get("weight"))
    assert codes is not None
    scales = tensors["weight_scale"].reshape(scale_shape)
    more: dict[str, Any] = {}
    if grid.stored_scales == "float":
        check(np.isfinite(scales), "weight_scale", "finite")
    elif grid.stored_scales == "e4m3":
        scales, more["tensor_scale"] = scales.view(np.uint8), tensors["weight_global_scale"].reshape(())
        check(scales & 0x7F != 0x7F, "weight_scale", "a finite e4m3")
        check(
            np.isfinite(more["tensor_scale"]) & (more["tensor_scale"] != 0), "weight_global_scale", "finite, and not 0"
        )
    else:
        check(scales != 255, "weight_scale", "an exponent")
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise ArtifactError(f"weight_shape says {tensors['weight_shape'].tolist()}, the layer has {list(shape)}")
    if form == BYTES:
        check((codes >= grid.element.lowest) & (codes <= grid.element.highest), "weight", f"a code of {grid.element}")
        return pack(QTensor(codes, scales, grid, dtype))
    if grid.has_zeros:
        more["zeros"] = zero_points(tensors["weight_zero_point"], grid, scale_shape)
    if grid.has_biases:
        more["biases"] = tensors["weight_biases"]
        check(np.isfinite(more["biases"]), "weight_biases", "finite")
    words = as_words(codes, width=packing.words(shape[-1], grid.element.bits))
    if grid.element.name in FINITE:
        magnitude, last = FINITE[grid.element.name]
        found = words.view(np.uint8) & magnitude
        check(found < last if grid.element.name == "e4m3" else found <= last, "weight", f"a finite {grid.element}")
    return Packed(words, scales, grid, dtype, shape, **more)


def contents(
    grid: Grid, *, shape: tuple[int, ...], form: str, kind: str = "float32"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every stored tensor of a weight of `shape`, whose float scales are of `kind`."""
    scales, bits = grid.scale_shape(shape), grid.element.bits
    flat = (1,) if grid.group == "tensor" else scales
    kind = {"e8m0": "uint8", "e4m3": "float8_e4m3fn" if form != OWN else "uint8"}.get(grid.stored_scales, kind)
    if form == BYTES:
        return {"weight": ("int8", shape), "weight_scale": (kind, flat)}
    if form in (PACKED, OWN):
        out = {
            "weight_packed": ("int32", (*shape[:-1], packing.words(shape[-1], bits))),
            "weight_scale": (kind, flat),
            "weight_shape": ("int64", (len(shape),)),
        }
        if grid.has_zeros:
            packed = ("int32", (packing.words(scales[0], bits), *scales[1:]))
            out["weight_zero_point"] = ("int8", (1,)) if grid.group == "tensor" else packed
        if grid.has_biases:
            out["weight_biases"] = (kind, scales)
        if grid.has_tensor_scale:
            out["weight_global_scale"] = ("float32", (1,))
        return out
    if form == "nvfp4-pack-quantized":
        more = {"weight_global_scale": ("float32", (1,))}
        return {"weight_packed": ("uint8", (*shape[:-1], shape[-1] // 2)), "weight_scale": (kind, scales), **more}
    if form == "mxfp4-pack-quantized":
        return {"weight_packed": ("uint8", (*shape[:-1], shape[-1] // 2)), "weight_scale": (kind, scales)}
    return {"weight": ("float8_e4m3fn", shape), "weight_scale": (kind, flat)}


def scale_type(tensors: Mapping[str, NDArray[Any]]) -> str:
    """NumPy's name of the type of the float scales among `tensors`; float32 where they are no floats."""
    found = tensors["weight_scale"].dtype.name if "weight_scale" in tensors else ""
    return found if found in DTYPES else "float32"


def _packed_zeros(zeros: NDArray[np.uint8], grid: Grid) -> NDArray[Any]:
    if grid.group == "tensor":
        return packing.signed(zeros, grid.element).reshape(-1)
    rows_last = np.ascontiguousarray(zeros.T)
    return np.ascontiguousarray(packing.pack(rows_last, grid.element.bits).view(np.int32).T)


def zero_points(stored: NDArray[Any], grid: Grid, scale_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The zero points of `weight_zero_point`: one byte with a sign for a tensor, else packed along the outputs.

    Raises:
        ArtifactError: the byte is no code of the element.
    """
    if grid.group == "tensor":
        element = grid.element
        check((stored >= element.lowest) & (stored <= element.highest), "weight_zero_point", f"a code of {element}")
        return packing.unsigned(stored, element).reshape(scale_shape)
    return np.ascontiguousarray(packing.unpack(stored.T, grid.element.bits, scale_shape[0]).T)
