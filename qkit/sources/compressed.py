"""compressed-tensors' files in every layout that llm-compressor writes: the form of each quantized weight.

Read off compressed-tensors 0.20. `qkit.formats.compressed_config` finds the weights that are on grids of qkit's own.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from qkit.errors import ArtifactError, GridError
from qkit.formats import compressed_config
from qkit.formats import settings as checks
from qkit.formats.packed import join
from qkit.formats.settings import shown
from qkit.formats.targets import CLASSES, Targets, patterns_limit, readable
from qkit.qtensor import DType
from qkit.reference import packing
from qkit.rules import Kind
from qkit.sources.encoded import Encoded, Form
from qkit.sources.floats import Floats
from qkit.sources.integers import Packed, is_contiguous
from qkit.sources.parts import FLOATS, Tensors, check_part, encoded, kind_of, take, want_type

PARTS: Final = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
    "weight_g_idx",
)
BITS: Final = (2, 3, 4, 5, 6, 8)
SCALES: Final = (*FLOATS, "uint8", "float8_e8m0fnu", "float8_e4m3fn")


def compressed(
    tensors: Tensors, config: Mapping[str, Any], dtype: DType | None, *, kind_of_path: Callable[[str], Kind]
) -> dict[str, Encoded]:
    """The weights in compressed-tensors' layouts, by name. Removes their parts from `tensors`.

    Args:
        config: the `quantization_config`.
        kind_of_path: returns the kind of the layer at a path, for groups that name a class.

    Raises:
        ArtifactError: the configuration is not readable, or has a setting or a layout that qkit does not read.
    """
    checks.check_compressed_tensors(config)
    found, used, targets = {}, set(), Targets.of(config)
    for path in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        parts = take(tensors, path, PARTS)
        try:
            with readable(), patterns_limit():
                checks.check_ignored(path, config.get("ignore"))
            name = targets.group_of(path, kind=CLASSES[kind_of_path(path)])
            used.add(name)
            with readable():
                group = config["config_groups"][name]
                compressed_config.form_of(config.get("format"), group.get("format"))
                form, shape = _form(parts, compressed_config.arguments(group["weights"]))
            codes = "weight_packed" if "weight_packed" in parts else "weight"
            known = want_type(parts["weight_scale"], dtype)
            found[join(path, "weight")] = encoded(
                join(path, "weight"), shape, dtype=known, form=form, parts=parts, codes=codes
            )
        except (ArtifactError, GridError) as error:
            raise ArtifactError(f"{path}: {error}") from None
    checks.check_unused(config["config_groups"], used)
    return found


def _form(parts: Tensors, weights: Mapping[str, Any]) -> tuple[Form, tuple[int, ...]]:
    """The form and the shape of the weight with these parts and settings."""
    bits, kind, symmetric = weights["num_bits"], weights["type"], weights["symmetric"]
    if kind == "int" and bits in BITS and type(symmetric) is bool:
        return _integers(parts, weights)
    if kind != "float" or symmetric is not True or bits not in (4, 8):
        raise ArtifactError(f"{bits} bits of {kind}, symmetric {symmetric}: qkit reads no such layout")
    scale = check_part(parts, "weight_scale", SCALES)
    if bits == 4:
        rows, half = _matrix(parts, "weight_packed", ("uint8",))
        shape, codes = (rows, 2 * half), "weight_packed"
    else:
        shape, codes = _matrix(parts, "weight", ("float8_e4m3fn", "float8_e5m2")), "weight"
    block = _block(shape, weights)
    _check_scale(parts, shape, block)
    factor = "weight_global_scale" if "weight_global_scale" in parts else ""
    if factor and check_part(parts, factor, ("float32",)).slot.shape not in ((), (1,)):
        raise ArtifactError(f"{factor} is {list(parts[factor].slot.shape)}: want one number")
    if not factor and kind_of(scale) == "float8_e4m3fn":
        raise ArtifactError("weight_global_scale is missing: fetch the directory again")
    _no_others(parts, codes, "weight_scale", factor)
    element = "e2m1" if bits == 4 else {"float8_e4m3fn": "e4m3"}.get(kind_of(parts[codes]), "e5m2")
    title = f"compressed-tensors, {element}, {_text(block, shape)}"
    return Floats(title, element, block, codes, "weight_scale", factor, divides=bool(factor)), shape


def _integers(parts: Tensors, weights: Mapping[str, Any]) -> tuple[Form, tuple[int, ...]]:
    bits, asymmetric = int(weights["num_bits"]), not weights["symmetric"]
    bytes_each = "weight_packed" not in parts
    if bytes_each:
        shape = _matrix(parts, "weight", ("int8",))
    else:
        stated = check_part(parts, "weight_shape", ("int64", "int32"), (2,)).read()
        shape = (int(stated[0]), int(stated[1]))
        if min(shape) < 1 or max(shape) > 1 << 31:
            raise ArtifactError(f"weight_shape says {list(shape)}: want two numbers above 0")
        check_part(parts, "weight_packed", ("int32",), (shape[0], packing.words(shape[1], bits)))
    block = _block(shape, weights)
    scales = _check_scale(parts, shape, block)
    if asymmetric:
        across = (packing.words(scales[0], bits), *scales[1:])
        stored = check_part(parts, "weight_zero_point", ("int8", "int32"))
        if stored.slot.shape not in (scales, across, scales[:1]) or (kind_of(stored) == "int32") != (
            stored.slot.shape == across and not bytes_each
        ):
            raise ArtifactError(
                f"weight_zero_point is {kind_of(stored)} {list(stored.slot.shape)}, for scales {list(scales)}"
            )
    ordered = True
    if "weight_g_idx" in parts:
        numbers = check_part(parts, "weight_g_idx", ("int32", "int64"), (shape[1],)).read()
        ordered = is_contiguous(numbers, block[1])
        if not ordered and (numbers.min() < 0 or numbers.max() >= scales[-1]):
            raise ArtifactError(
                f"weight_g_idx has numbers from {numbers.min()} to {numbers.max()}, and there are {scales[-1]} groups"
            )
    elif weights.get("actorder") in ("group", True):
        raise ArtifactError("its groups are in the order of activations, and weight_g_idx is missing")
    codes = ("weight",) if bytes_each else ("weight_packed", "weight_shape")
    _no_others(parts, *codes, "weight_scale", "weight_g_idx", "weight_zero_point" if asymmetric else "")
    return Packed(bits, block, bytes_each, asymmetric, ordered), shape


def _no_others(parts: Tensors, *known: str) -> None:
    """Refuses parts of a weight beside the `known` ones, which other readers may use.

    Raises:
        ArtifactError: there is one.
    """
    for name in parts:
        if name not in known:
            raise ArtifactError(f"{name} is there too, and its settings have no such tensor")


def _block(shape: tuple[int, ...], weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, n = shape
    strategy, size = weights["strategy"], weights.get("group_size")
    blocks = weights.get("block_structure")
    if strategy == "block":
        match blocks:
            case [int(down), int(along)] if min(down, along) > 0:
                return down, along
    elif blocks is not None:
        pass
    elif strategy in ("group", "tensor_group") and type(size) is int and size > 0 and n % size == 0:
        return 1, size
    elif strategy in ("channel", "tensor") and size in (None, -1):
        return (1, n) if strategy == "channel" else (rows, n)
    raise ArtifactError(
        f"strategy {shown(strategy)}, group_size {shown(size)}, block_structure {shown(weights.get('block_structure'))} "
        f"do not fit its shape {list(shape)}"
    )


def _check_scale(parts: Tensors, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales, which has to be that of blocks in a weight of `shape`."""
    down, along = (-(-size // one) for size, one in zip(shape, block, strict=True))
    wanted = [(down, along), *([(down,)] if along == 1 else []), *([()] if (down, along) == (1, 1) else [])]
    check_part(parts, "weight_scale", SCALES, *wanted)
    return down, along


def _matrix(parts: Tensors, name: str, kinds: tuple[str, ...]) -> tuple[int, int]:
    shape = check_part(parts, name, kinds).slot.shape
    if len(shape) != 2:
        raise ArtifactError(f"{name} has {len(shape)} axes: want two")
    return shape[0], shape[1]


def _text(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block == shape:
        return "one scale"
    if block == (1, shape[1]):
        return "a scale for each row"
    return f"groups of {block[1]}" if block[0] == 1 else f"blocks of {block[0]} x {block[1]}"
