"""AutoRound's own directories of small floats. Its integers lie in the layouts of GPTQ and AWQ: see `detect`.

Read off AutoRound 0.16 (`export/export_to_autoround`).
"""

from collections.abc import Mapping
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.packed import join
from qkit.formats.settings import shown
from qkit.qtensor import DType
from qkit.sources.encoded import Encoded
from qkit.sources.fp8 import asked_block, scaled
from qkit.sources.parts import Tensors, check_part

TYPES: Final = ("fp", "fp8", "fp8_e4m3", "mx_fp", "nv_fp", "nv_fp4", "mx_fp_rceil")  #: `data_type`s that qkit reads


def auto_round(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights of small floats in AutoRound's layouts, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: the data type or a part is not that of a layout that qkit reads; the message names it.
    """
    kind = settings.get("data_type")
    if kind not in TYPES:
        raise ArtifactError(f"data_type is {shown(kind)}: of AutoRound's, qkit reads int, {', '.join(TYPES)}")
    block = asked_block(settings)
    found = {}
    ends = (".weight_scale", ".weight_scale_inv")
    for path in sorted({name.rpartition(".")[0] for name in tensors if name.endswith(ends)}):
        try:
            found[join(path, "weight")] = _one(path, tensors, block, dtype)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    return found


def _one(path: str, tensors: Tensors, block: tuple[int, int] | None, dtype: DType | None) -> Encoded:
    packed = join(path, "weight_packed") in tensors
    codes = "weight_packed" if packed else "weight"
    names = {"codes": codes, "scales": "weight_scale", "divisor": "weight_global_scale"}
    if join(path, "weight_scale_inv") in tensors:
        names["scales"] = "weight_scale_inv"
    parts = {part: tensors.pop(join(path, name)) for part, name in names.items() if join(path, name) in tensors}
    check_part(parts, "codes", ("uint8",) if packed else ("float8_e4m3fn", "float8_e5m2"))
    return scaled(join(path, "weight"), parts, block, dtype, title="AutoRound")
