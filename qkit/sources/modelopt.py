"""ModelOpt's unified checkpoints: small floats, and integers of 8 and 4 bits, with the factors of inputs that AWQ finds.

Read off ModelOpt 0.47 (`export/quant_utils.py`, `export/unified_export_hf.py`) and vLLM 0.32 (`modelopt.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded, Valued
from qkit.sources.fp8 import ELEMENTS, block_of, scaled
from qkit.sources.integers import Signed
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, kind_of, want_type
from qkit.sources.smoothed import Smoothed

#: The `quant_algo`s whose weights qkit reads.
ALGORITHMS: Final = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8"),
    *("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8"),
    *("W8A16", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "MIXED_PRECISION"),
)
SMOOTH: Final = "pre_quant_scale"  #: factors of the inputs of a layer


def modelopt(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of ModelOpt's unified checkpoints, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a setting or a part is not that of a layout that qkit reads; the message names it.
    """
    inner = settings.get("quantization")
    table = inner if isinstance(inner, Mapping) else settings
    algorithm = str(table.get("quant_algo") or "").upper()
    if algorithm not in ALGORITHMS:
        raise ArtifactError(f"quant_algo is {shown(table.get('quant_algo'))}: qkit reads {', '.join(ALGORITHMS)}")
    found = {}
    for name in sorted(tensors):
        if not name.endswith("_scale") or (weight := name.removesuffix("_scale")) not in tensors:
            continue
        if kind_of(tensors[weight]) not in ELEMENTS:
            continue
        parts = {"codes": tensors.pop(weight), "scales": tensors.pop(name)}
        for part, stored in (("factor", f"{weight}_scale_2"), ("smooth", f"{weight.removesuffix('weight')}{SMOOTH}")):
            if stored in tensors:
                parts[part] = tensors.pop(stored)
        try:
            found[weight] = _smoothed(_one(weight, parts, dtype, f"ModelOpt {algorithm}"))
        except ArtifactError as error:
            raise ArtifactError(f"{weight}: {error}") from None
    if name := next((name for name in tensors if name.endswith(f".{SMOOTH}")), ""):
        raise ArtifactError(
            f"{name} multiplies the inputs of a layer whose weight is not quantized: fetch the files again"
        )
    return found


def _one(name: str, parts: Tensors, dtype: DType | None, title: str) -> Encoded:
    """The weight `name`. Integers have scales of floats; of 4 bits they lie in pairs of rows, and small floats along rows."""
    kind, scale = kind_of(parts["codes"]), kind_of(parts["scales"])
    if kind not in ("int8", "uint8") or scale not in FLOATS:
        return scaled(name, parts, None, dtype, title=title)
    if kind == "uint8":
        parts.pop("factor", None)  # a scale for the products of codes in fp8, and not for the weight
    if "factor" in parts:
        raise ArtifactError("weight_scale_2 is there too, and weights of 8 bits have no such tensor")
    bits, stored = (8 if kind == "int8" else 4), parts["codes"].slot.shape
    if len(stored) not in (2, 3):
        raise ArtifactError(f"it has {len(stored)} axes: want a matrix, or a stack of them")
    shape = stored if bits == 8 else (*stored[:-2], 2 * stored[-2], stored[-1])
    block = block_of(shape, parts["scales"].slot.shape, None)
    if block[0] not in (1, shape[-2]):
        raise ArtifactError(
            f"its scales are {list(parts['scales'].slot.shape)}: want one for each row or group of a row"
        )
    form = Signed(title, bits, block, stacked=len(stored) > 2)
    known = dtype or want_type(parts["scales"], None)
    return encoded(name, shape, dtype=known, form=form, parts=parts, codes="codes")


def _smoothed(one: Encoded) -> Encoded:
    """The weight times the factors of the layer's inputs, where it has any: the layer then takes its inputs as they come."""
    if "smooth" not in one.parts:
        return one
    if isinstance(one.form, Valued) or len(one.slot.shape) != 2:
        raise ArtifactError(f"{SMOOTH} is there, and the weight has {len(one.slot.shape)} axes: want two")
    check_part(one.parts, "smooth", FLOATS, one.slot.shape[-1:], (1, *one.slot.shape[-1:]))
    return replace(one, form=Smoothed(one.form, SMOOTH))
