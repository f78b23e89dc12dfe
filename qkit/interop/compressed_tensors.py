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
    tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: Sequence[int]
) -> QTensor[Any]:
    """The inverse of `to_tensors`, for a weight of `shape`.

    Raises:
        ArtifactError: a tensor is missing, or is not what the layout says.
    """
    try:
        return _from_tensors(tensors, grid=grid, dtype=dtype, shape=tuple(shape))
    except KeyError as error:
        raise ArtifactError(f"{error.args[0]} is missing, which {layout(grid)} needs") from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"not {layout(grid)} of {grid}: {error}") from None


def _from_tensors(
    tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]
) -> QTensor[Any]:
    form, element, scale_shape = layout(grid), grid.element, grid.scale_shape(shape)
    scales = tensors["weight_scale"]
    if form == "pack-quantized":
        if tuple(tensors["weight_shape"].tolist()) != shape:
            raise ArtifactError(f"weight_shape says {tensors['weight_shape'].tolist()}, the layer has {list(shape)}")
        codes = packing.unpacked_codes(tensors["weight_packed"], element=element, n=shape[-1], symmetric=grid.symmetric)
        zeros = None if grid.symmetric else _zeros(tensors["weight_zero_point"], grid, scale_shape)
        return QTensor(codes, scales.astype(np.float32).reshape(scale_shape), grid, dtype, zeros=zeros)
    if form.endswith("fp4-pack-quantized"):
        packed = tensors["weight_packed"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(shape)
        if grid.scale != "nvfp4":
            return QTensor(codes, scales, grid, dtype)
        tensor_scale = np.float32(1) / tensors["weight_global_scale"].reshape(())
        return QTensor(codes, scales.view(np.uint8), grid, dtype, tensor_scale=np.asarray(tensor_scale, np.float32))
    codes = tensors["weight"].view(np.uint8)
    if form == "float-quantized":
        scales = (scales.astype(np.float32).view(np.uint32) >> 23).astype(np.uint8).reshape(scale_shape)
    return QTensor(codes, scales, grid, dtype)


def names(grid: Grid) -> tuple[str, ...]:
    """The tensor names that `to_tensors` gives for `grid`."""
    form = layout(grid)
    if form == "pack-quantized":
        common = ("weight_packed", "weight_scale", "weight_shape")
        return common if grid.symmetric else (*common, "weight_zero_point")
    if form == "nvfp4-pack-quantized":
        return ("weight_packed", "weight_scale", "weight_global_scale")
    return ("weight_packed", "weight_scale") if form == "mxfp4-pack-quantized" else ("weight", "weight_scale")


def quantization_config(rules: Sequence[Rule], *, left_alone: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a config.json: one group for each rule, whose `match` are full layer paths.

    Args:
        rules: of the converted layers, with their paths.
        left_alone: paths of the linear layers that stay float.
    """
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(rules) == 1 and rule.kind == "linear" else list(rule.match),
            "weights": _arguments(rule.weight),
            "input_activations": _activation_arguments(rule.activation) if rule.activation else None,
            "output_activations": None,
            "format": layout(rule.weight),
        }
        for i, rule in enumerate(rules)
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


def _activation_arguments(grid: Grid) -> dict[str, Any]:
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
