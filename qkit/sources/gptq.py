"""GPTQ's and AWQ's files: the layout of every quantized weight, from their settings and tensors.

Read off GPTQModel 7.7 (`QuantizeConfig`, `quantization/config.py`), AutoGPTQ 0.7, AutoRound 0.16 and AutoAWQ 0.2.
"""

from collections.abc import Mapping
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.packed import join
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.integers import Awq, AwqRows, Gptq, is_contiguous
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, take, want_type

PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
BITS: Final = (2, 3, 4, 8)
#: Versions of GPTQ's files by `checkpoint_format`: whether zero points are stored less one.
LESS_ONE: Final = {"gptq": True, "": True, "gptq_v2": False}
MIXED: Final = (
    "dynamic",
    "extra_config",
)  #: settings that give some layers other bits or groups: GPTQModel's, AutoRound's
#: Settings of GPTQ that change values or layers, and that qkit does not carry out.
OTHERS: Final = ("adapter", "rotation", "kv_cache_scheme", "activation", "act_bits", "act_group_size")


def gptq(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights in GPTQ's layout, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a setting or a part is not that of a layout that qkit reads; the message names it.
    """
    version = str(settings.get("checkpoint_format") or settings.get("format") or "").lower()
    if version not in LESS_ONE:
        raise ArtifactError(
            f"checkpoint_format is {version!r}: qkit reads gptq and gptq_v2, which other readers open too"
        )
    for key in OTHERS:
        if settings.get(key) not in (None, False, {}, []) and not (key == "act_bits" and settings[key] >= 16):
            raise ArtifactError(f"{key} is {shown(settings[key])}, which qkit does not carry out")
    found = {}
    for path in _paths(tensors):
        parts = take(tensors, path, PARTS)
        try:
            found[join(path, "weight")] = _gptq(path, parts, settings, LESS_ONE[version], dtype)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    return found


def awq(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights in AWQ's layout, by name. Removes their parts from `tensors`. Raises as `gptq`."""
    bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version") or "gemm").lower()
    if bits != 4 or version not in AWQ or settings.get("zero_point", True) is not True:
        raise ArtifactError(
            f"AWQ with bits {shown(bits)}, version {version!r}, zero_point {shown(settings.get('zero_point'))}: qkit reads 4 "
            f"bits, versions {' and '.join(AWQ)} with zero points"
        )
    found = {}
    for path in _paths(tensors):
        parts = take(tensors, path, PARTS)
        try:
            found[join(path, "weight")] = AWQ[version](path, parts, settings, dtype)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    return found


def _paths(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def _gptq(path: str, parts: Tensors, settings: Mapping[str, Any], less_one: bool, dtype: DType | None) -> Encoded:
    words = check_part(parts, "qweight", ("int32", "uint32"))
    scales = check_part(parts, "scales", FLOATS)
    if len(words.slot.shape) != 2 or len(scales.slot.shape) != 2:
        raise ArtifactError(f"qweight is {list(words.slot.shape)}, scales are {list(scales.slot.shape)}: want two axes")
    packed, outputs = words.slot.shape
    groups = scales.slot.shape[0]
    g_idx = parts.get("g_idx")
    bits, mixed = settings.get("bits"), any(settings.get(key) for key in MIXED)
    if g_idx is not None:
        bits = packed * 32 / max(g_idx.slot.shape[0], 1)  # of this layer
    elif mixed and len(scales.slot.shape) == 2:  # the zero points lie along the outputs, and tell
        bits = next((one for one in BITS if _zeros_shape(parts) == (groups, -(-outputs * one // 32))), bits)
    if bits != settings.get("bits") and not mixed:
        raise ArtifactError(f"its tensors have {bits:g} bits, and the settings {shown(settings.get('bits'))}")
    if bits not in BITS:
        raise ArtifactError(f"bits is {shown(bits)}: qkit reads {', '.join(map(str, BITS))} of GPTQ")
    bits = int(bits)
    inputs = packed * 32 // bits
    group = -(-inputs // max(groups, 1))
    said = settings.get("group_size", group)
    if not (said == group or (said == -1 and groups == 1) or mixed):
        raise ArtifactError(f"group_size is {shown(said)}, and its {inputs} inputs have {groups} scales")
    check_part(parts, "scales", FLOATS, (groups, outputs))
    check_part(parts, "qzeros", ("int32", "uint32"), (groups, -(-outputs * bits // 32)))
    ordered = True
    if g_idx is not None:
        numbers = check_part(parts, "g_idx", ("int32", "int64"), (inputs,)).read()
        ordered = is_contiguous(numbers, group)
        if not ordered and (numbers.min() < 0 or numbers.max() >= groups):
            raise ArtifactError(
                f"g_idx has numbers from {numbers.min()} to {numbers.max()}, and there are {groups} groups"
            )
    if ordered and inputs % group:
        raise ArtifactError(f"its {inputs} inputs are no whole number of groups of {group}")
    form = Gptq(bits, group, ordered, less_one)
    shape = (outputs, inputs)
    return encoded(join(path, "weight"), shape, dtype=want_type(scales, dtype), form=form, parts=parts, codes="qweight")


def _zeros_shape(parts: Tensors) -> tuple[int, ...]:
    return parts["qzeros"].slot.shape if "qzeros" in parts else ()


def _awq(path: str, parts: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> Encoded:
    words = check_part(parts, "qweight", ("int32", "uint32"))
    scales = check_part(parts, "scales", FLOATS)
    if len(words.slot.shape) != 2 or len(scales.slot.shape) != 2:
        raise ArtifactError(f"qweight is {list(words.slot.shape)}, scales are {list(scales.slot.shape)}: want two axes")
    inputs, groups = words.slot.shape[0], scales.slot.shape[0]
    outputs = words.slot.shape[1] * 8
    said = settings.get("group_size", settings.get("q_group_size"))
    group = inputs // groups if groups and inputs % groups == 0 else 0
    if not group or not (said in (None, group) or (said == -1 and groups == 1)):
        raise ArtifactError(f"group_size is {shown(said)}, and its {inputs} inputs have {groups} scales")
    check_part(parts, "scales", FLOATS, (groups, outputs))
    check_part(parts, "qzeros", ("int32", "uint32"), (groups, outputs // 8))
    return encoded(
        join(path, "weight"),
        (outputs, inputs),
        dtype=want_type(scales, dtype),
        form=Awq(group),
        parts=parts,
        codes="qweight",
    )


def _awq_rows(path: str, parts: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> Encoded:
    words = check_part(parts, "qweight", ("int32", "uint32"))
    scales, zeros = check_part(parts, "scales", FLOATS), check_part(parts, "qzeros", ("int32", "uint32"))
    if any(len(one.slot.shape) != 2 for one in (words, scales, zeros)):
        raise ArtifactError(f"qweight is {list(words.slot.shape)}, scales are {list(scales.slot.shape)}: want two axes")
    outputs, inputs = words.slot.shape[0], 8 * words.slot.shape[1]
    said = settings.get("group_size", settings.get("q_group_size"))
    group = inputs if said == -1 else said
    if type(group) is not int or group < 1 or inputs % group:
        raise ArtifactError(f"group_size is {shown(said)}, and it has {inputs} inputs")
    places = zeros.slot.shape[1] * 8  # the numbers of groups are padded, see `calculate_zeros_width` of AutoAWQ
    if places < inputs // group:
        raise ArtifactError(f"its qzeros have {places} places, and there are {inputs // group} groups")
    check_part(parts, "scales", FLOATS, (outputs, places))
    check_part(parts, "qzeros", ("int32", "uint32"), (outputs, places // 8))
    return encoded(
        join(path, "weight"),
        (outputs, inputs),
        dtype=want_type(scales, dtype),
        form=AwqRows(group),
        parts=parts,
        codes="qweight",
    )


AWQ: Final = {"gemm": _awq, "gemv": _awq_rows}  #: by `version`
