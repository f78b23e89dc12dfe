"""Files of fp8 and fp4 codes: DeepSeek's blocks and their like, ModelOpt's, and gpt-oss's experts.

Read off transformers 5.23 (`finegrained_fp8.py`, `mxfp4.py`) and vLLM 0.32 (`fp8.py`, `modelopt.py`).
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
SCALES: Final = (*FLOATS, "float8_e8m0fnu", "uint8", "float8_e4m3fn")
#: Ends of the names of scales, by the end of the weight's own name that they replace.
SCALE_ENDS: Final = ("_scale_inv", "_scale")
MX: Final = 32  #: codes that share a scale in MXFP4
#: ModelOpt's `quant_algo`s whose weights qkit reads.
ALGORITHMS: Final = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "NVFP4", "MXFP8", "W4A16_NVFP4"),
    "MIXED_PRECISION",
)


def fp8(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of `quant_method: fp8`, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a setting or a part is not that of a layout that qkit reads; the message names it.
    """
    match settings.get("weight_block_size"):
        case None:
            block = None
        case [int(down), int(along)] if min(down, along) > 0:
            block = down, along
        case other:
            raise ArtifactError(f"weight_block_size is {shown(other)}: want two numbers above 0")
    found = {}
    for name in sorted(tensors):
        stored = tensors.get(name)
        scale = _scale_name(name, tensors)
        if stored is None or scale is None or kind_of(stored) not in ELEMENTS:
            continue
        parts = {"codes": tensors.pop(name), "scales": tensors.pop(scale)}
        try:
            found[name] = _scaled(name, parts, block, dtype, title="fp8")
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from None
    return found


def modelopt(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of ModelOpt's unified checkpoints, by name. Removes their parts from `tensors`. Raises as `fp8`."""
    inner = settings.get("quantization")
    table = inner if isinstance(inner, Mapping) else settings
    algorithm = str(table.get("quant_algo") or "").upper()
    if algorithm not in ALGORITHMS:
        raise ArtifactError(f"quant_algo is {shown(table.get('quant_algo'))}: qkit reads {', '.join(ALGORITHMS)}")
    if name := next((name for name in tensors if name.endswith("pre_quant_scale")), ""):
        raise ArtifactError(f"{name} multiplies the inputs of its layer, which qkit does not carry out")
    found = {}
    for name in sorted(tensors):
        if not name.endswith("_scale") or (weight := name.removesuffix("_scale")) not in tensors:
            continue
        if kind_of(tensors[weight]) not in ELEMENTS:
            continue
        parts = {"codes": tensors.pop(weight), "scales": tensors.pop(name)}
        if f"{weight}_scale_2" in tensors:
            parts["factor"] = tensors.pop(f"{weight}_scale_2")
        try:
            found[weight] = _scaled(weight, parts, None, dtype, title=f"ModelOpt {algorithm}")
        except ArtifactError as error:
            raise ArtifactError(f"{weight}: {error}") from None
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


def _scaled(name: str, parts: Tensors, block: tuple[int, int] | None, dtype: DType | None, *, title: str) -> Encoded:
    """A weight of floats under scales of any shape: one, one per row, per group of a row, or per block."""
    kind = kind_of(parts["codes"])
    element, stored = ELEMENTS[kind], parts["codes"].slot.shape
    scale = check_part(parts, "scales", SCALES)
    if len(stored) not in (2, 3):
        raise ArtifactError(f"it has {len(stored)} axes: want a matrix, or a stack of them")
    shape = (*stored[:-1], stored[-1] * (2 if element == "e2m1" else 1))
    down, along = _block(shape, scale.slot.shape, block)
    if "factor" in parts and check_part(parts, "factor", ("float32",)).slot.shape not in ((), (1,)):
        raise ArtifactError(f"weight_scale_2 is {list(parts['factor'].slot.shape)}: want one number")
    if element == "e2m1" and "factor" not in parts and kind_of(scale) == "float8_e4m3fn":
        raise ArtifactError("weight_scale_2 is missing: fetch the directory again")
    size = "one scale" if (down, along) == shape[-2:] else f"blocks of {down} x {along}"
    form = Floats(
        f"{title}, {element}, {size}",
        element,
        (down, along),
        "codes",
        "scales",
        "factor" if "factor" in parts else "",
        stacked=len(stored) > 2,
    )
    return encoded(name, shape, dtype=dtype or _type(scale), form=form, parts=parts, codes="codes")


def _type(scale: Stored) -> DType:
    return want_type(scale, None)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        ArtifactError: the shapes do not go together.
    """
    (rows, n), stack = shape[-2:], shape[:-2]
    flat = tuple(one for one in scales if one != 1) if len(scales) > len(shape) else scales
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
