"""Whether MLX has a kernel for a container on this device: asked by running it, since MLX has no other answer."""

from functools import lru_cache

import mlx.core as mx

from qkit.formats.mlx_lm import Container

ROWS = (1, 3, 48, 128)  #: MLX has other kernels for a token, for a few and for many


def why_no_kernel(container: Container, dtype: mx.Dtype, *, shape: tuple[int, int]) -> str:
    """What MLX says against inputs of `dtype` times a weight [outputs, inputs] in `container`; empty if nothing.

    On the CPU there is a kernel for all of them. On CUDA, MLX 0.32.4 refuses some shapes when it is asked to compute.
    """
    device = mx.default_device()
    return "" if device == mx.cpu else _tried(container, dtype, shape, str(device))


@lru_cache(maxsize=1024)
def _tried(container: Container, dtype: mx.Dtype, shape: tuple[int, int], device: str) -> str:
    outputs, inputs = shape
    affine = container.mode == "affine"
    words = mx.zeros((outputs, inputs * container.bits // 32), mx.uint32)
    scales = mx.ones((outputs, inputs // container.group), dtype if affine else mx.uint8)
    try:
        for rows in ROWS:
            mx.eval(
                mx.quantized_matmul(
                    mx.zeros((rows, inputs), dtype),
                    words,
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
