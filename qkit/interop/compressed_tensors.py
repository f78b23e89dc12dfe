"""The compressed-tensors layout, which transformers and vLLM open: tensor names, bytes and `quantization_config`.

Layouts read off compressed-tensors 0.20: `pack-quantized`, `mxfp4-pack-quantized`, `mxfp8-quantized`,
`nvfp4-pack-quantized`, `float-quantized`. Nothing is computed: codes and scales are renamed, shifted or viewed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import packing
from qkit.errors import ArtifactError
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit.recipe import Rule

Tensors = dict[str, NDArray[Any]]


def layout(grid: Grid) -> str:
    """The compressed-tensors format that holds tensors on `grid`.

    Raises:
        ArtifactError: there is none.
    """
    element, group = grid.element.name, grid.group
    if grid.element.kind == "integer":
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


def to_tensors(q: QTensor[NDArray[Any]]) -> Tensors:
    """The named arrays of one weight, without the layer's path: `weight_packed`, `weight_scale` and so on."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    form, element = layout(q.grid), q.grid.element
    if form == "pack-quantized":
        out: Tensors = {
            "weight_packed": packing.packed_codes(q).view(np.int32),
            "weight_scale": _float_scale(q.scales, q),
            "weight_shape": np.array(q.shape, np.int64),
        }
        if q.zeros is not None:
            rows_last = np.ascontiguousarray(q.zeros.T)
            packed = packing.pack(rows_last, element.bits).view(np.int32).T
            signed = packing.signed(q.zeros, element).reshape(-1)
            out["weight_zero_point"] = signed if q.grid.group == "tensor" else np.ascontiguousarray(packed)
        return out
    if form.endswith("fp4-pack-quantized"):
        low, high = q.codes[..., 0::2], q.codes[..., 1::2]
        out = {"weight_packed": low | high << 4, "weight_scale": q.scales}
        if q.tensor_scale is not None:
            out["weight_scale"] = q.scales.view(ml_dtypes.float8_e4m3fn)
            out["weight_global_scale"] = np.float32(1) / q.tensor_scale.reshape(1)
        return out
    codes = q.codes.view(ml_dtypes.float8_e4m3fn)
    if form == "mxfp8-quantized":
        return {"weight": codes, "weight_scale": q.scales}
    scale = (q.scales.astype(np.uint32) << 23).view(np.float32)
    return {"weight": codes, "weight_scale": _float_scale(scale, q)}


def from_tensors(
    tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]
) -> QTensor[Any]:
    """The inverse of `to_tensors`, for a weight of `shape`.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape than the layout says, or holds what no code or scale is.
    """
    for name, (kind, want) in contents(grid, dtype=dtype, shape=shape).items():
        if name not in tensors:
            raise ArtifactError(f"{name} is missing, which {layout(grid)} needs")
        if (tensors[name].dtype.name, tensors[name].shape) != (kind, want):
            found = f"{tensors[name].dtype.name} {list(tensors[name].shape)}"
            raise ArtifactError(f"{name} is {found}, where {layout(grid)} of {grid} has {kind} {list(want)}")
    form, element, scale_shape = layout(grid), grid.element, grid.scale_shape(shape)
    scales = tensors["weight_scale"]
    if form == "pack-quantized":
        if tuple(tensors["weight_shape"].tolist()) != shape:
            raise ArtifactError(f"weight_shape says {tensors['weight_shape'].tolist()}, the layer has {list(shape)}")
        scales = scales.astype(np.float32).reshape(scale_shape)
        _check(
            np.isfinite(scales) & (scales != 0) & (_mantissa(scales) & 0xFFFF == 0), "weight_scale", "a finite bfloat16"
        )
        codes = packing.unpacked_codes(tensors["weight_packed"], element=element, n=shape[-1], symmetric=grid.symmetric)
        zeros = None if grid.symmetric else _zeros(tensors["weight_zero_point"], grid, scale_shape)
        return QTensor(codes, scales, grid, dtype, zeros=zeros)
    if form == "nvfp4-pack-quantized":
        tensor_scale = np.asarray(np.float32(1) / tensors["weight_global_scale"].reshape(()), np.float32)
        _check(np.isfinite(tensor_scale) & (_mantissa(tensor_scale) == 0), "weight_global_scale", "a power of two")
        _check((scales.view(np.uint8) > 0) & (scales.view(np.uint8) < 0x7F), "weight_scale", "a positive e4m3")
        codes = _unpair(tensors["weight_packed"])
        return QTensor(codes, scales.view(np.uint8), grid, dtype, tensor_scale=tensor_scale)
    if form == "float-quantized":
        scales = scales.astype(np.float32).reshape(scale_shape)
        _check(np.isfinite(scales) & (scales > 0) & (_mantissa(scales) == 0), "weight_scale", "a power of two")
        scales = (scales.view(np.uint32) >> 23).astype(np.uint8)
    _check((scales > 0) & (scales < 255), "weight_scale", "an exponent")
    if form == "mxfp4-pack-quantized":
        return QTensor(_unpair(tensors["weight_packed"]), scales, grid, dtype)
    codes = tensors["weight"].view(np.uint8)
    _check(codes & 0x7F != 0x7F, "weight", "a finite e4m3")
    return QTensor(codes, scales, grid, dtype)


def contents(grid: Grid, *, dtype: DType, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every tensor that `to_tensors` gives for a weight of `shape`."""
    form, scales, bits = layout(grid), grid.scale_shape(shape), grid.element.bits
    float_scale = ("bfloat16" if dtype == "bfloat16" else "float32", (1,) if grid.group == "tensor" else scales)
    if form == "pack-quantized":
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


def quantization_config(rules: Sequence[tuple[Rule, Sequence[str]]], *, left_alone: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a config.json: one group for each rule.

    Args:
        rules: of the converted layers, each with the full paths of its layers.
        left_alone: paths of the linear layers that stay float.
    """
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(rules) == 1 and rule.kind == "linear" else list(paths),
            "weights": _arguments(rule.weight),
            "input_activations": _activation_arguments(rule.activation, rule),
            "output_activations": _activation_arguments(rule.output, rule),
            "format": layout(rule.weight),
        }
        for i, (rule, paths) in enumerate(rules)
        if rule.weight
    }
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(left_alone),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _arguments(grid: Grid) -> dict[str, Any]:
    strategy = {"row": "channel", "tensor": "tensor"}.get(str(grid.group), "group")
    scale_dtype = {"mxfp4-pack-quantized": "torch.uint8", "mxfp8-quantized": "torch.uint8"}.get(layout(grid))
    if grid.scale == "nvfp4":
        strategy, scale_dtype = "tensor_group", "torch.float8_e4m3fn"
    return {
        "num_bits": grid.element.bits,
        "type": "int" if grid.element.kind == "integer" else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group if isinstance(grid.group, int) else None,
        "dynamic": False,
        **({"scale_dtype": scale_dtype} if scale_dtype else {}),
    }


def _activation_arguments(grid: Grid | None, rule: Rule) -> dict[str, Any] | None:
    if grid is None:
        return None
    if rule.range != "dynamic":
        return _arguments(grid)
    arguments = {**_arguments(grid), "dynamic": "local" if grid.scale == "nvfp4" else True}
    return {**arguments, "strategy": "token"} if grid.group == "row" else arguments


def _float_scale(scale: NDArray[np.float32], q: QTensor[Any]) -> NDArray[Any]:
    """bfloat16 for a bfloat16 model, where it is exact since scales live on that grid; float32 for any other."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    stored: NDArray[Any] = scale.astype(ml_dtypes.bfloat16) if q.dtype == "bfloat16" else scale
    return stored.reshape(-1) if q.grid.group == "tensor" else stored


def _zeros(stored: NDArray[Any], grid: Grid, scale_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if grid.group == "tensor":
        return packing.unsigned(stored, grid.element).reshape(scale_shape)
    return np.ascontiguousarray(packing.unpack(stored.T, grid.element.bits, scale_shape[0]).T)


def _unpair(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _mantissa(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The 23 low bits of fp32 patterns."""
    return np.asarray(x, np.float32).view(np.uint32) & np.uint32(0x7FFFFF)


def _check(sound: NDArray[np.bool_], name: str, what: str) -> None:
    if not sound.all():
        raise ArtifactError(f"{name} holds {np.count_nonzero(~sound)} numbers, each of which should be {what}")
