"""MLX's layout, which mlx-lm opens: tensor names, bytes and the `quantization` of a config.json.

Read off mlx 0.32.4 (`mlx.nn.quantize`, `mlx.core.quantize`) and mlx-lm 0.32.2 (`utils.load_model`). The packed words equal those
of compressed-tensors. Scales are repeated where MLX's groups are shorter, and biases are computed exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError
from qkit.formats.packed import Tensors, check, check_parts, check_scales
from qkit.grid import Grid
from qkit.qtensor import DType
from qkit.reference import packing
from qkit.reference.packing import Packed

AFFINE_BITS: Final = (2, 3, 4, 5, 6, 8)  #: the widths of integers that MLX's kernels take (`mx.quantized_matmul`)
AFFINE_GROUPS: Final = (128, 64, 32)  # a longer group is repeated at the largest of these that divides it
MX_GROUP: Final = 32
AFFINE: Final = (4, 64)  #: bits and group size of `affine` where a config.json has null
MX_MODES: Final = {"e2m1": "mxfp4", "e4m3": "mxfp8"}
NARROW_BITS: Final = 4  #: most bits of an integer that MLX may decode in bfloat16; see `_scale_type`
MODES: Final = {"mxfp4": ("e2m1", 32), "mxfp8": ("e4m3", 32), "nvfp4": ("e2m1", 16)}  #: element and group of each mode

NAMES: Final = ("weight", "scales", "biases")  #: of the tensors of a weight


@dataclass(frozen=True, slots=True)
class Container:
    """One of MLX's quantization modes, with its bits and group size."""

    mode: str
    bits: int
    group: int

    @property
    def table(self) -> dict[str, Any]:
        """The container as a config.json and `to_quantized` name it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


def containers_for(grid: Grid, inputs: int) -> list[Container]:
    """The containers that store rows of `inputs` numbers on `grid` exactly, the one with fewest scales first.

    The others repeat scales. A container of `nvfp4` has no place for the power of two of the tensor.
    """
    group = grid.group if isinstance(grid.group, int) else inputs
    bits = grid.element.bits
    if grid.read:
        return _read_containers(grid)
    if grid.element.kind == "integer":
        return [Container("affine", bits, size) for size in AFFINE_GROUPS if group % size == 0 and bits in AFFINE_BITS]
    if grid.scale == "nvfp4":
        return [Container("nvfp4", bits, group)]
    if grid.element.name in MX_MODES and group % MX_GROUP == 0:
        return [Container(MX_MODES[grid.element.name], bits, MX_GROUP)]
    return []


def _read_containers(grid: Grid) -> list[Container]:
    """The container of a read grid. One that repeats scales would not give the same bytes back."""
    modes = {"affine": "affine", "stored-nvfp4": "nvfp4", "stored-e8m0": MX_MODES.get(grid.element.name, "")}
    mode, size = modes.get(grid.scale, ""), grid.group
    if not isinstance(size, int) or not mode:
        return []
    fits = grid.element.bits in AFFINE_BITS and size in AFFINE_GROUPS if mode == "affine" else MODES[mode][1] == size
    return [Container(mode, grid.element.bits, size)] if fits else []


def container_for(grid: Grid, inputs: int) -> Container | None:
    """The first of `containers_for`, which is the one in files; None where there is none."""
    return next(iter(containers_for(grid, inputs)), None)


def layout(grid: Grid, inputs: int) -> Container:
    """`container_for`, for a grid that has to have one.

    Raises:
        ArtifactError: MLX has no container for the grid.
    """
    container = container_for(grid, inputs)
    if container is None:
        size = (
            f"integers want {', '.join(map(str, AFFINE_BITS))} bits and groups that {AFFINE_GROUPS[-1]} divides, small floats "
            f"e2m1 or e4m3 in groups of {MX_GROUP}"
        )
        if grid.read:
            size = (
                "of grids of other programs it holds its own alone, affine, and e8m0 and e4m3 scales of e2m1 and e4m3"
            )
        raise ArtifactError(
            f"MLX holds no rows of {inputs} on {grid}: {size}; export --to dense, or leave the layer float"
        )
    return container


def store(packed: Packed) -> Tensors:
    """The arrays `weight`, `scales` and, for integers, `biases` of one packed weight. Codes are views, not copies.

    Raises:
        ArtifactError: MLX has no container for the grid, or block scales times the power of two of `nvfp4` are not exact.
    """
    rows, inputs = packed.shape
    container, grid = layout(packed.grid, inputs), packed.grid
    columns = inputs // container.group
    if grid.read:
        return _read_arrays(packed)
    scales = _folded(packed) if packed.tensor_scale is not None else packed.scales
    out = {"weight": packed.words, "scales": spread(scales, rows, columns)}
    if container.mode != "affine":
        return out
    zeros = np.float32(-grid.element.lowest) if packed.zeros is None else packed.zeros.astype(np.float32)
    kind = _scale_type(grid, packed.dtype)
    biases = spread(-zeros * packed.scales, rows, columns)
    return {**out, "scales": _as_type(out["scales"], kind), "biases": _as_type(biases, kind)}


def restore(tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]) -> Packed:
    """The inverse of `store`, for a weight of `shape`. Scales may have any float type. `nvfp4` gets a power of 2^0.

    Raises:
        ArtifactError: a tensor is missing or has another shape, or scales and biases do not belong to the grid.
    """
    container = layout(grid, shape[-1])
    kind = tensors["scales"].dtype.name if "scales" in tensors and container.mode == "affine" else None
    check_parts(dict(tensors), contents(grid, dtype=dtype, shape=shape, kind=kind), f"MLX {container.mode}", grid)
    words, scale_shape = tensors["weight"], grid.scale_shape(shape)
    if grid.read:
        return _read_weight(tensors, grid=grid, dtype=dtype, shape=shape)
    scales = _unspread(tensors["scales"], scale_shape, "scales")
    if container.mode == "affine":
        scales = scales.astype(np.float32)
        check_scales(scales, "scales")
        zeros = _zeros(scales, _unspread(tensors["biases"], scale_shape, "biases").astype(np.float32), grid)
        return Packed(words, scales, grid, dtype, shape, zeros)
    if container.mode == "nvfp4":
        check((scales > 0) & (scales < 0x7F), "scales", "a positive e4m3")
        return Packed(words, scales, grid, dtype, shape, tensor_scale=np.ones((), np.float32))
    check((scales > 0) & (scales < 255), "scales", "an exponent")
    if container.mode == "mxfp8":
        check(np.ascontiguousarray(words).view(np.uint8) & 0x7F != 0x7F, "weight", "a finite e4m3")
    return Packed(words, scales, grid, dtype, shape)


def contents(
    grid: Grid, *, dtype: DType, shape: tuple[int, ...], kind: str | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, NumPy type and shape of every tensor that `store` returns. `kind` overrides the type of affine scales."""
    container = layout(grid, shape[-1])
    scales = (*shape[:-1], shape[-1] // container.group)
    weight = ("uint32", (*shape[:-1], packing.words(shape[-1], container.bits)))
    if container.mode != "affine":
        return {"weight": weight, "scales": ("uint8", scales)}
    kind = kind or (dtype if grid.read else _scale_type(grid, dtype))
    return {"weight": weight, "scales": (kind, scales), "biases": (kind, scales)}


def shape_of(tensors: Mapping[str, NDArray[Any]], grid: Grid) -> tuple[int, ...]:
    """Shape of the weight on `grid` that `tensors` store. MLX's rows fill whole packed words.

    Raises:
        KeyError: a tensor is missing.
    """
    *rows, words = tensors["weight"].shape
    return (*rows, words * packing.WORD_BITS // grid.element.bits)


def grid_of(tensors: Mapping[str, NDArray[Any]], container: Container, *, dtype: DType) -> Grid:
    """The grid of tensors that MLX quantized: on a rule of qkit's where they are as qkit writes them, else a read one.

    Raises:
        ArtifactError: qkit has no such grid.
    """
    if container.mode != "affine":
        element, group = MODES[container.mode]
        if container.mode == "nvfp4":
            return Grid(element, group, "nvfp4" if (tensors["scales"] & 0x7F > 0).all() else "stored-nvfp4")
        return Grid(element, group, None if (tensors["scales"] > 0).all() else "stored-e8m0")
    wanted = tensors["scales"].shape
    if "biases" not in tensors or tensors["biases"].shape != wanted:
        found = list(tensors["biases"].shape) if "biases" in tensors else "missing"
        raise ArtifactError(f"biases are {found}, and scales {list(wanted)}: fetch the directory again")
    element, scales = f"int{container.bits}", tensors["scales"].astype(np.float32)
    lowest = np.float32(-(1 << (container.bits - 1)))
    symmetric = bool((tensors["biases"].astype(np.float32) == lowest * scales).all())
    rule = "minmax" if not symmetric else "signed" if (scales < 0).any() else "absmax"
    grid = Grid(element, container.group, rule)
    as_written = tensors["scales"].dtype.name == _scale_type(grid, dtype)
    return grid if as_written and is_whole(tensors, container) else Grid(element, container.group, "affine")


def is_whole(tensors: Mapping[str, NDArray[Any]], container: Container) -> bool:
    """Whether scales have 8 significant bits and every bias is -z scales for a code z: `minmax` then holds the same values."""
    if container.mode != "affine":
        return False
    scales, biases = (tensors[name].astype(np.float32) for name in ("scales", "biases"))
    try:
        check_scales(scales, "scales")
        _zeros(scales, biases, Grid(f"int{container.bits}", container.group, "minmax"))
    except ArtifactError:
        return False
    return True


def _read_arrays(packed: Packed) -> Tensors:
    """The arrays of a weight on a read grid, as they came. `nvfp4` has no place for another tensor scale than 1."""
    if packed.tensor_scale is not None and packed.tensor_scale != 1:
        raise ArtifactError(
            f"MLX's nvfp4 has no scale for the tensor, and this one is {float(packed.tensor_scale)}: export --to dense"
        )
    out: Tensors = {"weight": packed.words, "scales": packed.scales}
    return out if packed.biases is None else {**out, "biases": packed.biases}


def _read_weight(tensors: Mapping[str, NDArray[Any]], *, grid: Grid, dtype: DType, shape: tuple[int, ...]) -> Packed:
    words, scales = tensors["weight"], tensors["scales"]
    if grid.has_biases:
        for name in ("scales", "biases"):
            check(np.isfinite(tensors[name]), name, "finite")
        return Packed(words, scales, grid, dtype, shape, biases=tensors["biases"])
    if grid.has_tensor_scale:
        check(scales & 0x7F != 0x7F, "scales", "a finite e4m3")
        return Packed(words, scales, grid, dtype, shape, tensor_scale=np.ones((), np.float32))
    check(scales < 255, "scales", "an exponent")
    return Packed(words, scales, grid, dtype, shape)


def spread(per_group: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """Scales [outputs or 1, groups] repeated to [outputs, columns]."""
    every = np.broadcast_to(per_group, (rows, per_group.shape[1]))
    return every if per_group.shape[1] == columns else np.repeat(every, columns // per_group.shape[1], axis=1)


def _scale_type(grid: Grid, dtype: DType) -> str:
    """The type of affine scales and biases. MLX decodes in this type, and its layers return it.

    bfloat16 is exact for a scale (R3) and for a bias of -2^(bits-1) scales, but only for half of all biases of -z scales. MLX
    rounds code * scale before it adds the bias, so above 4 bits values would be off by up to a step (R11).
    """
    return "bfloat16" if dtype == "bfloat16" and grid.symmetric and grid.element.bits <= NARROW_BITS else "float32"


def _as_type(numbers: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Numbers of 8 significant bits as bfloat16, which is the upper half of their patterns; others stay float32."""
    if kind != "bfloat16":
        return numbers
    halves = np.ascontiguousarray(numbers).view("<u2")[..., 1::2]  # 0.7 of the time of a cast
    return np.ascontiguousarray(halves).view(kind)


def _folded(packed: Packed) -> NDArray[np.uint8]:
    """The block scales times the power of two of the tensor, as e4m3 codes."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    assert packed.tensor_scale is not None
    exact = packed.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * packed.tensor_scale
    with np.errstate(over="ignore"):
        scales = exact.astype(ml_dtypes.float8_e4m3fn)
    lost = np.count_nonzero(scales.astype(np.float32) != exact)
    if lost:
        exponent = int(np.log2(packed.tensor_scale))
        raise ArtifactError(
            f"MLX's nvfp4 has no scale for the tensor, and {lost} of {exact.size} block scales times its 2^{exponent} are no "
            "e4m3: use mxfp4, or export --to dense"
        )
    out: NDArray[np.uint8] = scales.view(np.uint8)
    return out


def _zeros(scales: NDArray[np.float32], biases: NDArray[np.float32], grid: Grid) -> NDArray[np.uint8] | None:
    if grid.symmetric:
        check(biases == grid.element.lowest * scales, "biases", f"{grid.element.lowest} scales")
        return None
    zeros = np.rint(-biases / scales)
    sound = (zeros >= 0) & (zeros <= grid.element.levels) & (-zeros * scales == biases)
    check(sound, "biases", f"-z scales, z a whole number up to {grid.element.levels}")
    out: NDArray[np.uint8] = zeros.astype(np.uint8)
    return out


def _unspread(every: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """The inverse of `spread`: the first of each run of equal scales."""
    if every.shape == shape:
        return every
    first = every[: shape[0]].reshape(shape[0], shape[1], -1)[..., 0]
    check(spread(first, *every.shape) == every, name, "that of its row or group")
    return first
