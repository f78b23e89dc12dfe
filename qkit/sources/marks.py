"""Signs of quantization in the names, types and shapes of tensors, layout by layout. No configuration is looked at."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

#: Names of layouts: how messages call them.
TITLES: Final = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ or AWQ",
    "fp8": "fp8 with a scale for each block",
    "scaled": "compressed-tensors, ModelOpt or another program with weight_scale",
    "modelopt": "ModelOpt's NVFP4",
    "mxfp4": "gpt-oss's MXFP4",
    "mlx": "MLX",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "aqlm": "AQLM or VPTQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "eetq": "EETQ",
    "quantizers": "ModelOpt before its export",
    "codes": "an unknown program",
}

#: By the last part of a name: the layout that has such tensors and no other.
ENDS: Final = {
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
    "weight_g_idx": "compressed-tensors",
    "qweight": "gptq",
    "qzeros": "gptq",
    "g_idx": "gptq",
    "weight_scale_inv": "fp8",
    "qscale_weight": "fp8",
    "weight_scale": "scaled",
    "weight_scale_2": "modelopt",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "nested_quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "W_q": "hqq",
    "codebooks": "aqlm",
    "centroids": "aqlm",
    "weight_scales": "eetq",
    "_weight_qdata": "torchao",
    "_weight_scale": "torchao",
    "_weight_zero_point": "torchao",
}
FLOAT8: Final = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
PACKED: Final = ("uint8", "int8", "int16", "uint16", "int32", "uint32")
#: Ends of the names of tensors of integers in float models: places, masks, kinds of tokens.
BUFFERS: Final = ("position_ids", "position_index", "token_type_ids", "bias", "mask", "input_ids")
#: Ends of the names of weights, besides `weight` itself: those of experts, in one tensor for all.
WEIGHTS: Final = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "weight")

Types = Mapping[str, tuple[str, tuple[int, ...]]]  #: by name: NumPy's name of the type, and the shape


def marks(types: Types) -> dict[str, str]:
    """The layouts that the tensors show signs of, each with the first tensor that does."""
    found: dict[str, str] = {}
    for name in types:
        for layout in _marks(name, types):
            found.setdefault(layout, name)
    return found


def parts_of(types: Types) -> set[str]:
    """The names of all tensors that show a sign of a layout."""
    return {name for name in types if next(_marks(name, types), None)}


def _marks(name: str, types: Types) -> Iterator[str]:
    known = list(_named(name, types))
    yield from known
    if not known and _holds_codes(name, types):
        yield "codes"


def _named(name: str, types: Types) -> Iterator[str]:
    """The layouts whose names of tensors `name` has."""
    kind, _ = types[name]
    path, _, end = name.rpartition(".")
    if end in ENDS:
        yield ENDS[end]
    if "quant_state." in name:
        yield "bitsandbytes"
    if "_quantizer." in name or end in ("_amax", "_pre_quant_scale"):
        yield "quantizers"
    if path.endswith("weight") and end in ("_data", "_scale", "_zeropoint"):
        yield "quanto"
    if end == "scales" and f"{path}.weight" in types:
        yield "mlx" if types[f"{path}.weight"][0] == "uint32" else "codes"
    if end.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in types and kind == "uint8":
        yield "mxfp4"
    if kind in FLOAT8 or (kind in PACKED and end in WEIGHTS and len(types[name][1]) > 1):
        yield "codes"


def _holds_codes(name: str, types: Types) -> bool:
    """Whether a tensor of any name is a matrix of short integers, or a stack of them, and no buffer that float models have."""
    kind, shape = types[name]
    return kind in PACKED and len(shape) in (2, 3) and min(shape) > 1 and not name.endswith(BUFFERS)


def types_of(arrays: Mapping[str, Any]) -> Types:
    """Types and shapes of `arrays`."""
    return {name: (array.dtype.name, tuple(array.shape)) for name, array in arrays.items()}
