"""bitsandbytes' weights: NF4 and FP4 with one or two levels of scales, and int8 by rows. No grid holds them: values only.

Read off bitsandbytes 0.50 (`functional.py`: `QuantState`, `dequantize_blockwise`, `int8_vectorwise_dequant`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors as Arrays
from qkit.qtensor import DTYPES, DType
from qkit.sources.encoded import Encoded
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, take

STATE: Final = "weight.quant_state.bitsandbytes__"
PARTS: Final = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"{STATE}nf4", f"{STATE}fp4"),
)
ROWS: Final = ("weight", "SCB", "weight_format")
STEP: Final = np.float32(0.00787401574803149606)  #: 1 / 127


@dataclass(frozen=True, slots=True)
class Table4:
    """Codes of 4 bits into a table, along the rows and through them: two in a byte, the first in the high bits.

    value = fl(table[code] * s), and s of each run of `block` values is stored, or is fl(fl(table2[code2] * s2) + offset).

    Attributes:
        kind: `nf4` or `fp4`.
        inputs: of the weight.
        run: values that share a scale.
        outer: scales that share a scale; 0 where scales are stored as floats.
        offset: of nested scales.
    """

    kind: str
    inputs: int
    run: int
    outer: int
    offset: float

    @property
    def name(self) -> str:
        """See `Valued`."""
        return f"bitsandbytes {self.kind}, runs of {self.run}"

    def values(self, parts: Arrays, rows: slice) -> NDArray[np.float32]:
        """The values of some rows [rows, inputs], float32."""
        pairs = parts["weight"].reshape(-1).view(np.uint8)
        begin, stop, _ = rows.indices(2 * len(pairs) // self.inputs)
        first, last = begin * self.inputs, stop * self.inputs
        some = pairs[first // 2 : -(-last // 2)]
        codes = np.stack((some >> np.uint8(4), some & np.uint8(15)), -1).reshape(-1)[first % 2 :][: last - first]
        runs = np.arange(first, last) // self.run
        scales = self._scales(parts, runs[0], runs[-1] + 1)
        table = parts["weight.quant_map"].reshape(-1).astype(np.float32)
        found: NDArray[np.float32] = table[codes] * scales[runs - runs[0]]
        return found.reshape(stop - begin, self.inputs)

    def _scales(self, parts: Arrays, begin: int, stop: int) -> NDArray[np.float32]:
        some = parts["weight.absmax"].reshape(-1)[begin:stop]
        if not self.outer:
            plain: NDArray[np.float32] = some.astype(np.float32)
            return plain
        table = parts["weight.nested_quant_map"].reshape(-1).astype(np.float32)
        outer = parts["weight.nested_absmax"].reshape(-1).astype(np.float32)[np.arange(begin, stop) // self.outer]
        found: NDArray[np.float32] = table[some] * outer + np.float32(self.offset)
        return found


@dataclass(frozen=True, slots=True)
class Rows8:
    """int8 codes with the largest magnitude of each row: value = fl(fl(code * SCB) / 127), as a product with 1 / 127."""

    @property
    def name(self) -> str:
        """See `Valued`."""
        return "bitsandbytes int8, a scale for each row"

    def values(self, parts: Arrays, rows: slice) -> NDArray[np.float32]:
        """The values of some rows [rows, inputs], float32."""
        peaks = parts["SCB"].reshape(-1)[rows].astype(np.float32)
        return parts["weight"][rows].astype(np.float32) * peaks[:, None] * STEP


def bitsandbytes(tensors: Tensors, settings: Mapping[str, Any], dtype: DType | None) -> dict[str, Encoded]:
    """The weights in bitsandbytes' layouts, by name. Removes their parts from `tensors`.

    Raises:
        ArtifactError: a part is missing, or is not that of a layout that qkit reads; the message names it.
    """
    found = {}
    paths = {name.removesuffix(".weight.absmax"): _table for name in tensors if name.endswith(".weight.absmax")}
    paths |= {name.removesuffix(".SCB"): _rows for name in tensors if name.endswith(".SCB")}
    for path, read in sorted(paths.items()):
        try:
            found[f"{path}.weight"] = read(
                f"{path}.weight", take(tensors, path, PARTS if read is _table else ROWS), dtype
            )
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    return found


def _table(name: str, parts: Tensors, dtype: DType | None) -> Encoded:
    kind = next((one for one in ("nf4", "fp4") if f"{STATE}{one}" in parts), "")
    if not kind:
        raise ArtifactError(
            "weight.quant_state is missing: save the model again, with bitsandbytes 0.41 or later, or fetch it again"
        )
    state = _state(parts.pop(f"{STATE}{kind}"))
    shape, run, known = tuple(state["shape"]), state["blocksize"], _type(state, dtype)
    if len(shape) != 2 or min(shape) < 1:
        raise ArtifactError(f"its shape is {list(shape)}: want two numbers above 0")
    runs = -(-prod(shape) // run)
    stored = check_part(parts, "weight", ("uint8", *FLOATS))
    if stored.slot.nbytes != -(-prod(shape) // 2):
        raise ArtifactError(
            f"weight has {stored.slot.nbytes} bytes, and the shape {list(shape)} has {prod(shape)} codes"
        )
    check_part(parts, "weight.quant_map", ("float32",), (16,))
    outer = 0
    if "weight.nested_absmax" in parts:
        outer = state["nested_blocksize"]
        check_part(parts, "weight.absmax", ("uint8",), (runs,), (runs, 1))
        check_part(parts, "weight.nested_absmax", ("float32",), (-(-runs // outer),))
        check_part(parts, "weight.nested_quant_map", ("float32",), (256,))
    else:
        check_part(parts, "weight.absmax", ("float32",), (runs,), (runs, 1))
    form = Table4(kind, shape[1], run, outer, float(state.get("nested_offset") or 0.0))
    return encoded(name, shape, dtype=known, form=form, parts=parts, codes="weight")


def _rows(name: str, parts: Tensors, dtype: DType | None) -> Encoded:
    shape = check_part(parts, "weight", ("int8",)).slot.shape
    if len(shape) != 2:
        raise ArtifactError(f"it has {len(shape)} axes: want two")
    check_part(parts, "SCB", FLOATS, shape[:1])
    layout = parts.pop("weight_format", None)
    if layout is not None and layout.read().reshape(-1).any():
        raise ArtifactError("weight_format is not 0: it lies in the order of one kernel; save the model again")
    known = dtype or "float16"  # as its loader computes
    return encoded(name, shape, dtype=known, form=Rows8(), parts=parts, codes="weight")


def _state(stored: Any) -> dict[str, Any]:
    """The settings of a weight, JSON in a tensor of bytes.

    Raises:
        ArtifactError: it is no such JSON.
    """
    try:
        state = json.loads(bytes(stored.read()).decode())
        sizes = [
            state["blocksize"],
            *state["shape"],
            *([state["nested_blocksize"]] if "nested_blocksize" in state else []),
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"weight.quant_state is not readable ({error!r}): fetch it again") from None
    if any(type(one) is not int or not 0 < one < 1 << 31 for one in sizes):
        raise ArtifactError(f"weight.quant_state has the sizes {sizes}: want numbers above 0")
    return dict(state)


def _type(state: Mapping[str, Any], dtype: DType | None) -> DType:
    known = dtype or next((one for one in DTYPES if one == state.get("dtype")), None)
    if known is None:
        raise ArtifactError("neither config.json nor its quant_state says of what type the weight was")
    return known
