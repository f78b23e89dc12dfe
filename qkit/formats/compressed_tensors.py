"""The compressed-tensors layout, which transformers and vLLM open: tensor names, bytes and `quantization_config`.

Layouts read off compressed-tensors 0.20: `pack-quantized`, `int-quantized`, `mxfp4-pack-quantized`, `mxfp8-quantized`,
`nvfp4-pack-quantized`, `float-quantized`. No value is computed: codes and scales are renamed, shifted or viewed.
"""

import math
from collections.abc import Container, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.element import LIMIT, MIN_SCALE_CODE, NVFP4_STEP
from qkit.errors import ArtifactError
from qkit.formats import read_layout
from qkit.formats.packed import Tensors, as_bytes, as_words, check, check_parts, check_scales, mantissa, pack, unpack
from qkit.formats.read_layout import BYTES, OWN, PACKED
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit.reference import packing
from qkit.reference.packing import Packed
from qkit.rules import Rule

#: Names of the tensors of a weight, in any of the formats.
NAMES = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight"),
    "weight_biases",
)
#: Range of the power of two of a tensor (R9): from the smallest E8M0 scale to that of the largest magnitude below 2^127.
TENSOR_SCALES: Final = 2.0 ** (MIN_SCALE_CODE - 127), 2.0 ** math.ceil(math.log2(LIMIT * NVFP4_STEP))
PACKED_BITS: Final = range(1, 9)  #: the widths of integers that compressed-tensors packs (`pack_to_int32`)
FORMATS = (PACKED, BYTES, "mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized", "float-quantized")


def layout(grid: Grid) -> str:
    """The name of the compressed-tensors format for weights on `grid`.

    Raises:
        ArtifactError: no format has this grid.
    """
    if grid.read:
        return read_layout.layout(grid)
    element, group = grid.element.name, grid.group
    if grid.element.kind == "integer" and grid.element.bits in PACKED_BITS:
        return "pack-quantized"
    if grid.scale == "nvfp4":
        return "nvfp4-pack-quantized"
    if (element, group) == ("e2m1", 32):
        return "mxfp4-pack-quantized"
    if (element, group) == ("e4m3", 32):
        return "mxfp8-quantized"
    if element == "e4m3" and group in ("row", "tensor"):
        return "float-quantized"
    raise ArtifactError(
        f"compressed-tensors has no layout for {grid}: use e2m1 or e4m3 in groups of 32, or e4m3 per row or tensor"
    )


def form_of(rule: Rule) -> str:
    """The format of weights under `rule`: that of their grid, or a byte for each code where servers multiply codes with codes.

    vLLM 0.32 multiplies int8 inputs with symmetric int8 weights by row or tensor, and with symmetric int4 weights, in that
    format only (`CompressedTensorsW8A8Int8`, `CompressedTensorsW4A8Int`).

    Raises:
        ArtifactError: no format has the grid.
    """
    grid, activation = rule.weight, rule.activation
    assert grid is not None
    form = layout(grid)
    if form != PACKED or activation is None or activation.element.kind != "integer" or not grid.symmetric:
        return form
    whole = grid.element.bits == 8 and grid.group in ("row", "tensor")
    return BYTES if whole or grid.element.bits == 4 else PACKED


def server_tensors(rule: Rule) -> dict[str, NDArray[np.float32]]:
    """Tensors that servers want beside a weight under `rule`, and qkit does not need: the tensor scale of inputs on `nvfp4`.

    With 1, blocks whose largest magnitude is from 0.1 to 2,688 have all bits of their e4m3 scale.
    """
    moving = rule.activation is not None and rule.activation.scale == "nvfp4"
    return {"input_global_scale": np.ones(1, np.float32)} if moving else {}


def stored_form(names: Container[str], grid: Grid) -> str:
    """The format of a weight on `grid` whose stored tensors have these `names`: integers are in one of two."""
    form = layout(grid)
    return BYTES if form == PACKED and grid.symmetric and "weight" in names and "weight_packed" not in names else form


def to_tensors(q: QTensor[NDArray[Any]], form: str = "") -> Tensors:
    """The named arrays of one weight, without the layer's path: `weight_packed`, `weight_scale` and so on.

    `form` is the format, where it is not that of the grid; see `form_of`.
    """
    return store(pack(q), form)


def from_tensors(
    tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]
) -> QTensor[Any]:
    """The inverse of `to_tensors`, for a weight of `shape`; see `restore`."""
    return unpack(restore(tensors, grid=grid, dtype=dtype, shape=shape))


def store(packed: Packed, form: str = "") -> Tensors:
    """The named arrays of one packed weight, in the `form` of `to_tensors`. Codes are views, but for `int-quantized`."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    form, bits, inputs = form or layout(packed.grid), packed.grid.element.bits, packed.shape[-1]
    if packed.grid.read:
        return read_layout.store(packed, form)
    if form == BYTES:
        return {"weight": unpack(packed).codes, "weight_scale": _float_scale(packed.scales, packed)}
    if form == PACKED:
        out: Tensors = {
            "weight_packed": packed.words.view(np.int32),
            "weight_scale": _float_scale(packed.scales, packed),
            "weight_shape": np.array(packed.shape, np.int64),
        }
        if packed.zeros is not None:
            rows_last = np.ascontiguousarray(packed.zeros.T)
            rows = packing.pack(rows_last, bits).view(np.int32).T
            signed = packing.signed(packed.zeros, packed.grid.element).reshape(-1)
            out["weight_zero_point"] = signed if packed.grid.group == "tensor" else np.ascontiguousarray(rows)
        return out
    codes = as_bytes(packed.words, width=inputs * bits // 8)
    if form == "nvfp4-pack-quantized":
        assert packed.tensor_scale is not None
        reciprocal = np.float32(1) / packed.tensor_scale.reshape(1)
        scale = packed.scales.view(ml_dtypes.float8_e4m3fn)
        return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": reciprocal}
    if form == "mxfp4-pack-quantized":
        return {"weight_packed": codes, "weight_scale": packed.scales}
    if form == "mxfp8-quantized":
        return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": packed.scales}
    scale = (packed.scales.astype(np.uint32) << 23).view(np.float32)
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": _float_scale(scale, packed)}


def restore(tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]) -> Packed:
    """The inverse of `store`, for a weight of `shape`.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape than the layout, or has a value that is no code or scale.
    """
    form, scale_shape, zeros, tensor_scale = stored_form(tensors, grid), grid.scale_shape(shape), None, None
    if grid.read:
        return read_layout.restore(tensors, grid=grid, dtype=dtype, shape=shape, form=form)
    check_parts(dict(tensors), contents(grid, dtype=dtype, shape=shape, form=form), form, grid)
    scales = tensors["weight_scale"]
    codes = tensors.get("weight_packed", tensors.get("weight"))
    assert codes is not None
    if form == BYTES:
        scales = scales.astype(np.float32).reshape(scale_shape)
        check_scales(scales, "weight_scale")
        check((codes >= grid.element.lowest) & (codes <= grid.element.highest), "weight", f"a code of {grid.element}")
        return pack(QTensor(codes, scales, grid, dtype))
    if form == PACKED:
        if tuple(tensors["weight_shape"].tolist()) != shape:
            raise ArtifactError(f"weight_shape says {tensors['weight_shape'].tolist()}, the layer has {list(shape)}")
        scales = scales.astype(np.float32).reshape(scale_shape)
        check_scales(scales, "weight_scale")
        zeros = None if grid.symmetric else read_layout.zero_points(tensors["weight_zero_point"], grid, scale_shape)
        return Packed(codes.view(np.uint32), scales, grid, dtype, shape, zeros)
    if form == "nvfp4-pack-quantized":
        tensor_scale = read_tensor_scale(tensors["weight_global_scale"])
        scales = scales.view(np.uint8)
        check((scales > 0) & (scales < 0x7F), "weight_scale", "a positive e4m3")
    elif form == "float-quantized":
        scales = scales.astype(np.float32).reshape(scale_shape)
        check(np.isfinite(scales) & (scales > 0) & (mantissa(scales) == 0), "weight_scale", "a power of two")
        scales = (scales.view(np.uint32) >> 23).astype(np.uint8)
    check((scales > 0) & (scales < 255), "weight_scale", "an exponent")
    if "weight" in tensors:
        check(codes.view(np.uint8) & 0x7F != 0x7F, "weight", "a finite e4m3")
    words = as_words(codes, width=packing.words(shape[-1], grid.element.bits))
    return Packed(words, scales, grid, dtype, shape, tensor_scale=tensor_scale)


def contents(
    grid: Grid, *, dtype: DType, shape: tuple[int, ...], form: str = "", kind: str = ""
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every stored tensor of a weight of `shape`, in the `form` of `to_tensors`.

    `kind` is the type of the float scales of a read grid; the default is that of the weight.
    """
    form, scales, bits = form or layout(grid), grid.scale_shape(shape), grid.element.bits
    if grid.read:
        return read_layout.contents(grid, shape=shape, form=form, kind=kind or dtype)
    float_scale = ("bfloat16" if dtype == "bfloat16" else "float32", (1,) if grid.group == "tensor" else scales)
    if form == BYTES:
        return {"weight": ("int8", shape), "weight_scale": float_scale}
    if form == PACKED:
        out = {
            "weight_packed": ("int32", (*shape[:-1], packing.words(shape[-1], bits))),
            "weight_scale": float_scale,
            "weight_shape": ("int64", (len(shape),)),
        }
        if not grid.symmetric:
            packed = ("int32", (packing.words(scales[0], bits), *scales[1:]))
            out["weight_zero_point"] = ("int8", (1,)) if grid.group == "tensor" else packed
        return out
    pairs = ("uint8", (*shape[:-1], shape[-1] // 2))
    if form == "nvfp4-pack-quantized":
        scale = ("float8_e4m3fn", scales)
        return {"weight_packed": pairs, "weight_scale": scale, "weight_global_scale": ("float32", (1,))}
    if form == "mxfp4-pack-quantized":
        return {"weight_packed": pairs, "weight_scale": ("uint8", scales)}
    scale = ("uint8", scales) if form == "mxfp8-quantized" else float_scale
    return {"weight": ("float8_e4m3fn", shape), "weight_scale": scale}


def shape_of(tensors: Mapping[str, NDArray[Any]], grid: Grid) -> tuple[int, ...]:
    """Shape of the weight on `grid` that `tensors` store. `pack-quantized` has a tensor for it: packed words do not tell.

    Raises:
        KeyError: a tensor is missing.
    """
    if stored_form(tensors, grid) in (PACKED, OWN):
        return tuple(tensors["weight_shape"].tolist())
    if grid.element.name == "e2m1":
        *rows, pairs = tensors["weight_packed"].shape
        return (*rows, 2 * pairs)
    return tuple(tensors["weight"].shape)


def _float_scale(scale: NDArray[np.float32], q: Packed) -> NDArray[Any]:
    """Scales as bfloat16 for a bfloat16 model, which is exact since every scale is a bfloat16 (R3); as float32 for others."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    stored: NDArray[Any] = scale.astype(ml_dtypes.bfloat16) if q.dtype == "bfloat16" else scale
    return stored.reshape(-1) if q.grid.group == "tensor" else stored


def read_tensor_scale(stored: NDArray[np.float32]) -> NDArray[np.float32]:
    """The power of two of an NVFP4 tensor, shape (), from its stored reciprocal (R9).

    Raises:
        ArtifactError: the value is no power of two that R9 allows for magnitudes below 2^127.
    """
    value = float(stored.reshape(()))
    sound = math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5
    if not sound or not TENSOR_SCALES[0] <= 1 / value <= TENSOR_SCALES[1]:
        low, high = (int(math.log2(1 / bound)) for bound in reversed(TENSOR_SCALES))
        raise ArtifactError(f"weight_global_scale is {value}: want a power of two from 2^{low} to 2^{high}")
    return np.asarray(np.float32(1 / value))
