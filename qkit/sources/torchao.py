"""torchao's safetensors: codes of a byte each, integers or e4m3, with scales for rows or groups.

Read off torchao 0.18 (`prototype/safetensors`, `Int8Tensor`, `IntxUnpackedToInt8Tensor`, `Float8Tensor`) and transformers 5.23
(`quantizer_torchao.py`). torchao's other tensors lie in the order of a kernel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qkit.element import ELEMENTS
from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors as Arrays
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.reference import packing
from qkit.sources.encoded import Encoded
from qkit.sources.fp8 import scaled
from qkit.sources.integers import Grouped
from qkit.sources.law import Codes
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, kind_of, want_type

WAYS: Final = (
    "Int8WeightOnlyConfig",
    "IntxWeightOnlyConfig",
    "Float8WeightOnlyConfig",
)  #: classes of settings that qkit reads
END: Final = "._weight_qdata"
PARTS: Final = {"scales": "_weight_scale", "zeros": "_weight_zero_point"}
PACKING: Final = "UNPACKED_TO_INT8"
MANY: Final = ("ModuleFqnToConfig", "FqnToConfig")  #: classes with settings for some layers each


@dataclass(frozen=True, slots=True)
class Bytes(Grouped):
    """Signed integers, a byte each, with scales and zero points [outputs, groups].

    Attributes:
        bits: of a code.
        group: codes that share a scale.
        asymmetric: whether zero points count; otherwise all of them are 0.
    """

    bits: int
    group: int
    asymmetric: bool

    @property
    def name(self) -> str:
        """See `Form`."""
        return f"torchao, {self.bits} bits{' with zero points' if self.asymmetric else ''}, groups of {self.group}"

    def codes(self, parts: Arrays, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        element = ELEMENTS[f"int{self.bits}"]
        codes, scales = (np.ascontiguousarray(parts[name][rows]) for name in ("codes", "scales"))
        zeros = np.ascontiguousarray(parts["zeros"][rows]) if "zeros" in parts else np.zeros(scales.shape, np.int8)
        for title, one in (("codes", codes), ("zero points", zeros)):
            if one.min() < element.lowest or one.max() > element.highest:
                raise ArtifactError(f"its {title} are no integers of {self.bits} bits: fetch the directory again")
        if not self.asymmetric and zeros.any():
            raise ArtifactError("it has zero points, and its settings say that it has none: fetch the directory again")
        if not self.asymmetric:
            return Codes(element.name, codes, scales, (1, self.group))
        codes, zeros = packing.unsigned(codes, element), packing.unsigned(zeros, element)
        return Codes(element.name, codes, scales, (1, self.group), zeros=zeros)


def torchao(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of torchao's tensors, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a class of settings, or a part of a weight, is none that qkit reads; the message names it.
    """
    tables = list(_tables(settings.get("quant_type")))
    for kind, _ in tables:
        if kind not in WAYS:
            raise ArtifactError(
                f"quant_type is {kind}: of torchao's, qkit reads {', '.join(WAYS)}, whose codes lie in the order of the weight; "
                "AutoModelForCausalLM.from_pretrained(DIR).dequantize() of transformers makes a float model of it"
            )
    found = {}
    for name in sorted(one for one in tensors if one.endswith(END)):
        path = name.removesuffix(END)
        parts = {"codes": tensors.pop(name)}
        parts |= {mine: tensors.pop(one) for mine, end in PARTS.items() if (one := f"{path}.{end}") in tensors}
        try:
            found[f"{path}.weight"] = _weight(f"{path}.weight", parts, tables, dtype)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    return found


def _weight(name: str, parts: Tensors, tables: list[tuple[str, Mapping[str, Any]]], dtype: DType | None) -> Encoded:
    kind, shape = kind_of(check_part(parts, "codes", ("int8", "float8_e4m3fn"))), parts["codes"].slot.shape
    scale = check_part(parts, "scales", FLOATS)
    if kind != "int8":
        return scaled(name, parts, None, dtype, title="torchao")
    groups = scale.slot.shape[-1] if len(scale.slot.shape) == 2 else 0
    if len(shape) != 2 or not groups or scale.slot.shape[0] != shape[0] or shape[1] % groups:
        raise ArtifactError(
            f"codes are {list(shape)}, and scales {list(scale.slot.shape)}: want [outputs, inputs] and [outputs, groups]"
        )
    if "zeros" in parts:
        check_part(parts, "zeros", ("int8",), scale.slot.shape)
    bits = {_bits(table) for kind, table in tables if kind == "IntxWeightOnlyConfig"} | {
        8 for kind, _ in tables if kind == "Int8WeightOnlyConfig"
    }
    asymmetric = any(_of(table.get("mapping_type")) == "ASYMMETRIC" for _, table in tables)
    form = Bytes(max(bits, default=8), shape[1] // groups, asymmetric)
    return encoded(name, shape, dtype=want_type(scale, dtype), form=form, parts=parts, codes="codes")


def _tables(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every class of settings with its fields."""
    table = value.get("default", value) if isinstance(value, Mapping) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("_data"), Mapping):
        raise ArtifactError(f"quant_type is {shown(value)}: want settings of torchao 0.14 or later")
    kind, fields = str(table.get("_type")), table["_data"]
    if kind not in MANY:
        if kind == "IntxWeightOnlyConfig" and _of(fields.get("intx_packing_format"), PACKING) != PACKING:
            kind = f"{kind} in the format {_of(fields['intx_packing_format'])}"
        yield kind, fields
        return
    inner = next((one for one in fields.values() if isinstance(one, Mapping)), {})
    for one in inner.values():
        if one is not None:
            yield from _tables(one)


def _bits(table: Mapping[str, Any]) -> int:
    """The width of codes, which are read as wider ones where there are none of it."""
    said = _of(table.get("weight_dtype"), "int8")
    return next((e.bits for name, e in ELEMENTS.items() if name == said), 8)


def _of(value: Any, default: str = "") -> str:
    """The text of a number's type or of a choice in torchao's JSON."""
    return str(value.get("_data", default)) if isinstance(value, Mapping) else str(value or default)
