"""How a converted layer runs on a device: one of MLX's kernels multiplies its codes, or it decodes them first.

MLX has no other way to ask for a kernel than to run it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from qkit.formats.mlx_lm import Container, containers_for
from qkit.grid import Grid
from qkit.qtensor import DType
from qkit.reference.packing import WORD_BITS
from qkit.rules import Rule

Product = Callable[..., mx.array]  #: of inputs [rows, inputs] and a weight in a container

GPU = mx.Device(mx.gpu, 0)
ROWS = (1, 3, 48, 128)  #: row counts to try: MLX has other kernels for one token, for a few and for many
BFLOAT16_BITS = 4  #: most bits of integers that may be decoded in bfloat16; see `_decodes_in_bfloat16`


@dataclass(frozen=True, slots=True)
class Execution:
    """How a converted layer runs.

    Attributes:
        native: whether a kernel multiplies its codes; else every call decodes them.
        text: the kernel; or the reason why there is none.
        container: MLX's container for the codes; None for plain arrays.
        in_bfloat16: whether MLX's GPU kernels multiply bfloat16 inputs without a cast to float32.
    """

    native: bool
    text: str
    container: Container | None = None
    in_bfloat16: bool = False


def choose_execution(rule: Rule, *, device: mx.Device, dtype: DType, shape: tuple[int, ...]) -> Execution:
    """How a converted layer under `rule`, with a weight [outputs, inputs] of `shape`, runs on `device`.

    Takes the smallest of MLX's containers for the grid that has a kernel.
    """
    module = "QuantizedEmbedding" if rule.kind == "embedding" else "QuantizedLinear"
    return _choose(rule, device, dtype, shape, module, _multiply)


def choose_gather(rule: Rule, *, device: mx.Device, dtype: DType, shape: tuple[int, ...]) -> Execution:
    """The same for a stack of experts whose weights [outputs, inputs] are of `shape`."""
    return _choose(rule, device, dtype, shape, "QuantizedSwitchLinear", _gather_multiply)


def _choose(
    rule: Rule, device: mx.Device, dtype: DType, shape: tuple[int, ...], module: str, product: Product
) -> Execution:
    grid = rule.weight
    assert grid is not None
    outputs, inputs = shape
    if rule.kind == "embedding" and grid.read and grid.has_tensor_scale:
        return Execution(False, f"MLX would round the values of {grid} twice")
    why_not = f"MLX has no container for {grid}"
    for container in containers_for(grid, inputs):
        in_bfloat16 = _decodes_in_bfloat16(grid, container) and dtype == "bfloat16" and device == GPU
        computed = mx.bfloat16 if in_bfloat16 else mx.float32
        why_not = why_no_kernel(container, computed, device=device, shape=(outputs, inputs), product=product)
        if not why_not:
            return Execution(True, f"{module}, {_describe(grid, container)}", container, in_bfloat16)
    return Execution(False, why_not)


def _multiply(x: mx.array, weight: mx.array, **options: Any) -> mx.array:
    return mx.quantized_matmul(x, weight, **options)


def _gather_multiply(
    x: mx.array, weight: mx.array, *, scales: mx.array, biases: mx.array | None, **options: Any
) -> mx.array:
    each = mx.zeros((len(x),), mx.uint32)
    biases = None if biases is None else biases[None]
    return mx.gather_qmm(x[:, None], weight[None], scales[None], biases, rhs_indices=each, **options)


def why_no_kernel(
    container: Container, dtype: mx.Dtype, *, device: mx.Device, shape: tuple[int, int], product: Product = _multiply
) -> str:
    """Why no kernel multiplies inputs of `dtype` with a weight [outputs, inputs] in `container`; empty if one does.

    The CPU has a kernel for every container. On CUDA, MLX 0.32.4 refuses some shapes when it computes.
    """
    return "" if device == mx.cpu else try_kernel(container, dtype, shape, str(device), product)


@lru_cache(maxsize=1024)
def try_kernel(
    container: Container, dtype: mx.Dtype, shape: tuple[int, int], device: str, product: Product = _multiply
) -> str:
    """MLX's error for such a product on the default device, which is called `device` here; empty without one."""
    outputs, inputs = shape
    affine = container.mode == "affine"
    weight = mx.zeros((outputs, inputs * container.bits // WORD_BITS), mx.uint32)
    scales = mx.ones((outputs, inputs // container.group), dtype if affine else mx.uint8)
    try:
        for rows in ROWS:
            mx.eval(
                product(
                    mx.zeros((rows, inputs), dtype),
                    weight,
                    scales=scales,
                    biases=scales if affine else None,
                    transpose=True,
                    group_size=container.group,
                    bits=container.bits,
                    mode=container.mode,
                )
            )
    except (RuntimeError, ValueError) as error:
        return f"MLX has no kernel for it on {device}: {str(error).splitlines()[0]}"
    return ""


def _decodes_in_bfloat16(grid: Grid, container: Container) -> bool:
    """Whether decoding in bfloat16, as MLX's GPU kernels do for bfloat16 inputs, is close enough.

    Small floats stay exact. Symmetric integers have exact scales and biases, but code * scale rounds before the bias is added:
    values are off by up to 0.054 of a step at 4 bits (0.027 if rounded once), and by 0.98 at 8.
    """
    return container.mode != "affine" or (grid.symmetric and container.bits <= BFLOAT16_BITS)


def _describe(grid: Grid, container: Container) -> str:
    name = f"affine {container.bits}-bit" if container.mode == "affine" else container.mode
    if grid.group == container.group:
        return f"{name} g{container.group}"
    scale = f"{grid.group} scale" if isinstance(grid.group, str) else f"scale of g{grid.group}"
    return f"{name}, {scale} repeated at g{container.group}"
