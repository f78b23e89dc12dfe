"""Every grid, and the tensors that find mistakes: ties, powers of two, and their neighbours."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import E2M1_BOUNDARIES, ELEMENTS, LIMIT, MIN_SCALE, Element
from qkit.grid import INTEGER_RULES, Grid
from qkit.qtensor import DType
from qkit.reference.rounding import DTYPE, FLOAT8

Wide = NDArray[np.float64]

ROW = 128  #: inputs of a row where the grid has no group size
COUPLED_SHAPE = (8, 64)  #: shape of every tensor for a `coupled` grid
STEPS = (0.01171875, 1.1953125, 2.0**-90)  #: scales of the ties: bfloat16 numbers, the last close to the smallest scale


def all_grids() -> list[Grid]:
    """Every element with every scale rule, in groups of 32, 64 and 128, per row and per tensor."""
    integers = [f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)]
    grids = [Grid(name, group, rule) for name in integers for rule in INTEGER_RULES for group in (32, 64, 128)]
    for name in integers:
        for group in ("row", "tensor"):
            grids += [Grid(name, group), Grid(name, group, "minmax")]
    for name in ("e2m1", "e4m3", "e5m2"):
        grids += [Grid(name, group, rule) for rule in ("rceil", "even", "floor") for group in (32, "row")]
    return [*grids, Grid("e4m3", "tensor"), Grid("e2m1", 16, "nvfp4")]


def coupled(grid: Grid) -> bool:
    """Whether the scale, or a part of it, belongs to the whole tensor, so that one number can change every other."""
    return grid.group == "tensor" or grid.scale == "nvfp4"


def random(shape: tuple[int, ...], seed: int, dtype: DType = "float32") -> NDArray[Any]:
    """Standard normal numbers of `shape`; one seed gives the same numbers on every machine."""
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPE[dtype])


def tensors(grid: Grid, dtype: DType = "float32") -> dict[str, NDArray[Any]]:
    """Named tensors [rows, n] of finite numbers below 2^127, n a multiple of the group; the same each time.

    All have the same n, so that they can be stacked. For a `coupled` grid all have the same shape, and must not be stacked.
    """
    size = _group_size(grid)
    named = {name: _fit(groups, dtype) for name, groups in _groups(grid, size, dtype).items()}
    if not coupled(grid):
        return {name: _rows(groups, grid) for name, groups in named.items() if len(groups)}
    return {
        f"{name} {i}": group.reshape(COUPLED_SHAPE) for name, groups in named.items() for i, group in enumerate(groups)
    }


def _group_size(grid: Grid) -> int:
    if coupled(grid):
        return COUPLED_SHAPE[0] * COUPLED_SHAPE[1]
    return grid.group if isinstance(grid.group, int) else ROW


def _fit(groups: Wide, dtype: DType) -> NDArray[Any]:
    """The groups that hold only finite numbers below 2^127 once they are of `dtype`."""
    with np.errstate(over="ignore"):
        narrow = groups.astype(np.float32).astype(DTYPE[dtype])
    return narrow[(np.abs(narrow.astype(np.float32)) < LIMIT).all(axis=1)]


def _rows(groups: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """Two groups a row, so that a group has a neighbour, unless the row is the group."""
    if grid.group == "row":
        return groups
    even = groups if len(groups) % 2 == 0 else np.concatenate([groups, groups[-1:]])
    return even.reshape(len(even) // 2, -1)


def _groups(grid: Grid, size: int, dtype: DType) -> dict[str, Wide]:
    """Groups [count, size] by name; where the scale belongs to the tensor, a group is a tensor."""
    draw = np.random.default_rng(20)
    normal = draw.standard_normal((8, size))
    share = draw.uniform(-1, 1, (4, size))
    alternating = np.where(np.arange(size) % 2, -1.0, 1.0)
    made = {
        "zeros": np.stack([np.zeros(size), np.full(size, -0.0), alternating * 0]),
        "constants": np.outer([1, -1, 0.1, -0.1, 3, -7, 1e-30, -1e30, 65504, 2.0**-126], np.ones(size)),
        "one sign": np.concatenate([-np.abs(normal[:2]), np.abs(normal[:2])]),
        "equal ends": np.stack([alternating, -alternating * 0.7, np.sign(normal[0]) * 5]),
        "normal": np.concatenate([normal * scale for scale in (1.0, 0.02, 1e-4, 100.0)]),
        "mixed with zeros": normal * (draw.random((8, size)) < 0.3),
        "one outlier": _outliers(normal * 0.02, draw.integers(0, size, len(normal))),
        "extremes": np.concatenate([normal[:2] * 1e30, normal[:2] * 1e-30, normal[:1] * 1e37]),
        "huge beside tiny": np.where(draw.random((2, size)) < 0.5, 1e30, 1e-30) * share[:2],
        "subnormals": _subnormals(draw, size, dtype),
        "powers": _powers(grid, share, dtype),
        "ties": _ties(grid, size, dtype),
    }
    return made | ({"blocks": _nvfp4_blocks()} if grid.scale == "nvfp4" else {})


def _outliers(groups: Wide, places: NDArray[np.int64]) -> Wide:
    out = groups.copy()
    out[np.arange(len(out)), places] *= -3000
    return out


def _subnormals(draw: np.random.Generator, size: int, dtype: DType) -> Wide:
    """Multiples of the type's smallest number, alone and below one ordinary number; also float32's own."""
    smallest = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}[dtype]
    alone = draw.integers(-127, 128, (2, size)) * smallest
    below = alone.copy()
    below[:, 0] = [1.0, -(2.0**-14)]
    return np.concatenate([alone, below, draw.integers(-(2**22), 2**22, (2, size)) * 2.0**-149])


def _powers(grid: Grid, share: Wide, dtype: DType) -> Wide:
    """Groups whose largest magnitude is where an exponent or a scale changes, or beside it; all exponents."""
    element = grid.element
    edges = [1.0]
    if element.kind == "float":
        edges += [element.largest / 2.0**element.max_exponent, 2 - 2.0 ** -(element.mantissa + 1)]
    exponents = range(-126, 127, 14 if coupled(grid) else 1)
    peaks = _neighbours([edge * 2.0**k for k in exponents for edge in edges], dtype)
    signed = peaks * np.where(np.arange(len(peaks)) % 2, -1, 1)
    groups = signed[:, None] * share[np.arange(len(peaks)) % len(share)]
    groups[:, 0] = signed
    return groups


def _ties(grid: Grid, size: int, dtype: DType) -> Wide:
    """Groups with a known scale, full of numbers halfway between two codes, and their neighbours."""
    made = []
    for step in STEPS if grid.element.kind == "integer" else (2.0**-7, 1.0, 2.0**-90):
        ends = _ends(grid, step)
        points = _neighbours([tie * step for tie in _halfway(grid.element)], dtype)
        per_group = size - len(ends)
        padded = np.resize(points, -(-len(points) // per_group) * per_group).reshape(-1, per_group)
        made.append(np.concatenate([np.broadcast_to(ends, (len(padded), len(ends))), padded], axis=1))
    smallest = np.linspace(-3, 3, size)[None] * MIN_SCALE  # scales that would fall below the smallest
    return np.concatenate([*made, smallest, smallest * grid.element.largest / 3])


def _ends(grid: Grid, step: float) -> list[float]:
    """The largest members of a group whose scale is then `step`."""
    element = grid.element
    if element.kind == "float":
        return [element.largest * step]
    if grid.scale == "minmax":
        zero = element.levels // 2
        return [-zero * step, (element.levels - zero) * step]
    return [{"signed": element.lowest, "absmax": element.highest, "midmax": element.highest + 0.5}[grid.scale] * step]


def _halfway(element: Element) -> list[float]:
    """Where one code rounds to the next, in units of the scale."""
    if element.kind == "integer":
        return [k + 0.5 for k in range(element.lowest - 1, element.highest + 1)]
    if element.name == "e2m1":
        edges = [edge for edge, _ in E2M1_BOUNDARIES]
    else:
        codes = np.arange(1 << (element.bits - 1), dtype=np.uint8).view(FLOAT8[element.name]).astype(np.float64)
        edges = [(low + high) / 2 for low, high in pairwise(codes[np.isfinite(codes)].tolist())]
    return [*edges, *(-edge for edge in edges)]


def _nvfp4_blocks() -> Wide:
    """Tensors with tensor scale 1 whose blocks have every e4m3 scale in turn, and the ties between them."""
    element = ELEMENTS["e4m3"]
    scales = np.arange(1, 127, dtype=np.uint8).view(FLOAT8["e4m3"]).astype(np.float64)
    edges = np.array([edge for edge, _ in E2M1_BOUNDARIES])
    ties = _neighbours([6 * edge for edge in _halfway(element) if edge > 0], "float32")
    blocks = [np.concatenate([[6 * s], s * edges, -s * edges, [0.0]]) for s in scales]
    blocks += [np.concatenate([[tie], np.linspace(-1, 1, 15) * tie]) for tie in ties]
    per_tensor = COUPLED_SHAPE[0] * COUPLED_SHAPE[1] // 16 - 1
    peak = np.full((1, 16), 6 * 448.0)
    chunks = [blocks[i : i + per_tensor] for i in range(0, len(blocks), per_tensor)]
    chunks[-1] += blocks[: per_tensor - len(chunks[-1])]
    return np.stack([np.concatenate([peak, np.stack(chunk)]).ravel() for chunk in chunks])


def _neighbours(points: Iterable[float], dtype: DType) -> Wide:
    """Each point as a number of `dtype`, with the next number below and above it."""
    with np.errstate(over="ignore"):
        x = np.array(list(points)).astype(DTYPE[dtype])
        following: Callable[..., Any] = np.nextafter
        beside = [following(x, np.array(way, x.dtype)) for way in (-np.inf, np.inf)]
    return np.stack([x, *beside], axis=1).astype(np.float64).ravel()
