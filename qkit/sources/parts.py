"""The stored parts of quantized weights: taken by name, with their types and shapes checked from headers alone."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError
from qkit.formats.packed import join
from qkit.qtensor import DTYPES, DType
from qkit.sources.encoded import Encoded, Form, Valued
from qkit.storage import layout
from qkit.storage.layout import TYPE_NAMES, Slot
from qkit.storage.read import Stored

#: Ends of the names of scales that belong to inputs, outputs and caches, not to weights.
MOVING: Final = (
    *("input_scale_ub", "input_scale", "input_zero_point", "input_global_scale", "input_scale_inv", "activation_scale"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale"),
    *("k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale"),
)
FLOATS: Final = ("float32", "bfloat16", "float16")
Tensors = dict[str, Stored]


def kind_of(stored: Stored) -> str:
    """NumPy's name of the type of a stored tensor."""
    return layout.DTYPES[stored.slot.dtype][0]


def take(tensors: Tensors, path: str, names: Collection[str]) -> Tensors:
    """The tensors of the layer at `path` that `names` lists, by these names. Removes them from `tensors`."""
    return {name: tensors.pop(join(path, name)) for name in names if join(path, name) in tensors}


def check_part(parts: Mapping[str, Stored], name: str, kinds: Collection[str], *shapes: tuple[int, ...]) -> Stored:
    """The part `name`, which has to have one of `kinds` as NumPy names them, and one of `shapes` if there are any.

    Raises:
        ArtifactError: the part is missing, or has another type or shape.
    """
    if name not in parts:
        raise ArtifactError(f"{name} is missing: fetch the directory again")
    kind, shape = kind_of(parts[name]), parts[name].slot.shape
    if kind not in kinds or (shapes and shape not in shapes):
        wanted = f"{' or '.join(kinds)}{' ' if shapes else ''}{' or '.join(str(list(one)) for one in shapes)}"
        raise ArtifactError(f"{name} is {kind} {list(shape)}: want {wanted}")
    return parts[name]


def encoded(
    name: str,
    shape: tuple[int, ...],
    *,
    dtype: DType,
    form: Form | Valued,
    parts: Mapping[str, Stored],
    codes: str,
    transposed: bool = False,
) -> Encoded:
    """The float tensor `name` that `parts` encode; `codes` is the name of the part with the codes.

    Raises:
        ArtifactError: an axis is empty.
    """
    if 0 in shape:
        raise ArtifactError(f"{name} has the shape {list(shape)}: an axis is empty")
    stored = parts[codes]
    return Encoded(Slot(name, TYPE_NAMES[dtype], shape), stored.file, stored.begin, form, dict(parts), transposed)


def float_type(config: Mapping[str, Any] | None, tensors: Mapping[str, Stored]) -> DType | None:
    """The type of the model's floats: as its configuration says, but that of its float matrices where none is of that type.

    None where neither tells.
    """
    tables = [config or {}, *(part for part in (config or {}).values() if isinstance(part, Mapping))]
    said = [str(table.get(key) or "").removeprefix("torch.") for table in tables for key in ("dtype", "torch_dtype")]
    stated = next((dtype for one in said for dtype in DTYPES if one == dtype), None)
    matrices = [one for name, one in tensors.items() if name.endswith(".weight") and len(one.slot.shape) == 2]
    kinds = Counter(kind_of(one) for one in matrices if kind_of(one) in DTYPES)
    if stated is not None and (not kinds or stated in kinds):
        return stated
    return next((dtype for kind, _ in kinds.most_common() for dtype in DTYPES if kind == dtype), stated)


def want_type(scale: Stored, known: DType | None) -> DType:
    """The type of a weight's values, as the model has them: `known`, or that of its scale where this has 16 bits.

    Raises:
        ArtifactError: neither tells.
    """
    kind = kind_of(scale)
    found = known or next((dtype for dtype in DTYPES if dtype == kind != "float32"), None)
    if found is None:
        raise ArtifactError(
            "neither config.json nor a tensor says of what type the weight was: add dtype to config.json"
        )
    return found
