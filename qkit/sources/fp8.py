"""Files of fp8 and fp4 codes: DeepSeek's blocks and their like, and gpt-oss's experts.

Read off transformers 5.23 (`finegrained_fp8.py`, `fbgemm_fp8.py`, `mxfp4.py`) and vLLM 0.32 (`fp8.py`).
"""

from collections.abc import Mapping
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.floats import Floats
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, kind_of, want_type
from qkit.storage.read import Stored

ELEMENTS: Final = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "uint8": "e2m1", "int8": "e2m1"}
BYTES: Final = ("uint8", "int8")  #: types of bytes that hold two codes of e2m1
SMALL: Final = ("float8_e8m0fnu", "uint8", "float8_e4m3fn")  #: types of the scales of such codes
SCALES: Final = (*FLOATS, "float8_e8m0fnu", "uint8", "float8_e4m3fn")
#: Ends of the names of scales, by the end of the weight's own name that they replace.
SCALE_ENDS: Final = ("_scale_inv", "_scale")
FACTORS: Final = {
    "factor": "weight_scale_2",
    "divisor": "weight_global_scale",
}  #: scales for all, and their names in files
MX: Final = 32  #: codes that share a scale in MXFP4


def asked_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale; None where the settings name no block.

    Raises:
        ArtifactError: they are not two numbers above 0.
    """
    match settings.get("weight_block_size"):
        case None:
            return None
        case [int(down), int(along)] if min(down, along) > 0:
            return down, along
        case other:
            raise ArtifactError(f"weight_block_size is {shown(other)}: want two numbers above 0")


def fp8(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of `quant_method: fp8`, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a setting or a part is not that of a layout that qkit reads; the message names it.
    """
    block = asked_block(settings)
    found = {}
    for name in sorted(tensors):
        stored = tensors.get(name)
        scale = _scale_name(name, tensors)
        if stored is None or scale is None or kind_of(stored) not in ELEMENTS:
            continue
        parts = {"codes": tensors.pop(name), "scales": tensors.pop(scale)}
        try:
            if kind_of(parts["codes"]) in BYTES and kind_of(parts["scales"]) not in SMALL:
                kinds = kind_of(parts["codes"]), kind_of(parts["scales"])
                raise ArtifactError(f"its codes are {kinds[0]}, and its scales {kinds[1]}: want codes in float8_e4m3fn")
            found[name] = scaled(name, parts, block, dtype, title="fp8")
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None
    return found


def mxfp4(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """gpt-oss's experts, by the names of transformers' float tensors, which are transposed. Raises as `fp8`."""
    found = {}
    for name in sorted(name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        parts = {part: tensors.pop(f"{name}_{part}") for part in ("blocks", "scales") if f"{name}_{part}" in tensors}
        try:
            experts, outputs, groups, half = _axes(check_part(parts, "blocks", ("uint8",)), 4)
            if half * 2 != MX:
                raise ArtifactError(f"blocks has {half} bytes for each scale: want {MX // 2}")
            check_part(parts, "scales", ("uint8", "float8_e8m0fnu"), (experts, outputs, groups))
            form = Floats("MXFP4", "e2m1", (1, MX), "blocks", "scales", stacked=True)
            shape = (experts, groups * MX, outputs)
            known = dtype or "bfloat16"  # as its loader decodes it
            found[name] = encoded(name, shape, dtype=known, form=form, parts=parts, codes="blocks", transposed=True)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None
    return found


def _scale_name(name: str, tensors: Tensors) -> str | None:
    """The name of the scale of the weight `name`: DeepSeek's, transformers' for stacks, and those of two later models."""
    path = name.removesuffix(".weight")
    names = [f"{name}{end}" for end in SCALE_ENDS]
    names += [f"{path}.scale", f"{path}.qscale_weight"] if path != name else []
    return next((one for one in names if one in tensors), None)


def scaled(name: str, parts: Tensors, block: tuple[int, int] | None, dtype: DType | None, *, title: str) -> Encoded:
    """A weight of floats under scales of any shape: one, one per row, per group of a row, or per block.

    Args:
        parts: `codes`, `scales`, and where there is one scale for all, `factor` or `divisor`.

    Raises:
        ArtifactError: the types or the shapes of the parts do not go together.
    """
    kind = kind_of(parts["codes"])
    element, stored = ELEMENTS[kind], parts["codes"].slot.shape
    scale = check_part(parts, "scales", SCALES)
    if len(stored) not in (2, 3):
        raise ArtifactError(f"it has {len(stored)} axes: want a matrix, or a stack of them")
    shape = (*stored[:-1], stored[-1] * (2 if element == "e2m1" else 1))
    down, along = block_of(shape, scale.slot.shape, block)
    whole = next((one for one in FACTORS if one in parts), "")
    if whole and check_part(parts, whole, ("float32",)).slot.shape not in ((), (1,)):
        raise ArtifactError(f"{FACTORS[whole]} is {list(parts[whole].slot.shape)}: want one number")
    if element == "e2m1" and not whole and kind_of(scale) == "float8_e4m3fn":
        raise ArtifactError("weight_scale_2 or weight_global_scale is missing: fetch the directory again")
    size = "one scale" if (down, along) == shape[-2:] else f"blocks of {down} x {along}"
    form = Floats(
        f"{title}, {element}, {size}",
        element,
        (down, along),
        "codes",
        "scales",
        whole,
        divides=whole == "divisor",
        stacked=len(stored) > 2,
    )
    return encoded(name, shape, dtype=dtype or _type(scale), form=form, parts=parts, codes="codes")


def _type(scale: Stored) -> DType:
    return want_type(scale, None)


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        ArtifactError: the shapes do not go together.
    """
    (rows, n), stack = shape[-2:], shape[:-2]
    flat = tuple(one for one in scales if one != 1) if len(scales) > len(shape) else scales
    if len(scales) == len(shape) + 2 and scales[-3] == scales[-1] == 1:  # ModelOpt's blocks: [..., rows, 1, columns, 1]
        flat = (*scales[:-3], scales[-2])
    if not stack and len([one for one in flat if one != 1]) == 0:
        return rows, n
    if flat in ((rows,), (rows, 1)):
        return 1, n
    if stack and flat == stack:
        return rows, n
    if len(flat) == len(shape) and flat[:-2] == stack and min(flat) > 0:
        down, along = flat[-2:]
        if block and (-(-rows // block[0]), -(-n // block[1])) == (down, along):
            return block
        if rows % down == 0 and n % along == 0:
            return rows // down, n // along
    said = f" in blocks of {block[0]} x {block[1]}" if block else ""
    raise ArtifactError(f"its shape is {list(shape)}{said}, and its scales are {list(scales)}: they do not go together")


def _axes(stored: Stored, count: int) -> tuple[int, ...]:
    if len(stored.slot.shape) != count:
        raise ArtifactError(f"{stored.slot.name} has {len(stored.slot.shape)} axes: want {count}")
    return stored.slot.shape
