"""AMD Quark's directories of small floats: fp8 with scales of any shape, and MXFP4.

Read off vLLM 0.32 (`quantization/quark`) and transformers 5.23 (`quantizer_quark.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.fp8 import scaled
from qkit.sources.parts import Tensors, check_part

TYPES: Final = ("fp8_e4m3", "fp4")  #: `dtype`s of weights that qkit reads


def quark(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights in Quark's layouts of small floats, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: weights have another type, or a part is not that of a layout that qkit reads; the message names it.
    """
    for place, kind in _types(settings):
        if kind not in TYPES:
            raise ArtifactError(f"{place}: dtype is {shown(kind)}: of Quark's, qkit reads {', '.join(TYPES)}")
    found = {}
    for name in sorted(tensors):
        weight = name.removesuffix("_scale")
        if not name.endswith("weight_scale") or weight not in tensors:
            continue
        parts = {"codes": tensors.pop(weight), "scales": tensors.pop(name)}
        try:
            check_part(parts, "codes", ("float8_e4m3fn", "uint8"))
            found[weight] = scaled(weight, parts, None, dtype, title="Quark")
        except ArtifactError as error:
            raise ArtifactError(f"{weight}: {error}") from None
    return found


def _types(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The type of weights in each table of settings, with the place of the table."""
    tables = {"global_quant_config": settings.get("global_quant_config")}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        inner = settings.get(key)
        tables |= {f"{key}.{name}": one for name, one in inner.items()} if isinstance(inner, Mapping) else {}
    for place, table in tables.items():
        weight = table.get("weight") if isinstance(table, Mapping) else None
        if isinstance(weight, Mapping):
            yield place, weight.get("dtype")
        elif weight is not None:  # a list: one quantization after the other
            yield place, weight
