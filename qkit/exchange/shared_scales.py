"""One tensor scale for weights that servers fuse, in artifacts whose scales differ: powers of two move into block scales."""

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qkit import fused
from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError
from qkit.reference.packing import Packed


def share_scales(source: Snapshot) -> Snapshot:
    """`source`, whose fused weights on `nvfp4` have the largest of their tensor scales, and the values that they had.

    Raises:
        ArtifactError: a block scale is no e4m3 under the shared scale.
    """
    weights = dict(source.weights)
    for group in fused.groups(path for path, weight in weights.items() if fused.shares(weight.rule.weight)):
        scales = {path: _tensor_scale(weights[path]) for path in group}
        largest = max(scales.values())
        for path in (path for path in group if scales[path] != largest):
            _moved(weights[path].read(), largest, f"{source.folder}: {path}")  # before anything is written
            weights[path] = replace(weights[path], read=_reading(weights[path].read, largest, path))
    return replace(source, weights=weights)


def _tensor_scale(weight: StoredWeight) -> float:
    scale = weight.read().tensor_scale
    assert scale is not None
    return float(scale)


def _reading(read: Callable[[], Packed], largest: float, path: str) -> Callable[[], Packed]:
    return lambda: _moved(read(), largest, path)


def _moved(packed: Packed, largest: float, where: str) -> Packed:
    assert packed.tensor_scale is not None
    blocks = packed.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wanted: NDArray[np.float32] = blocks * (packed.tensor_scale / np.float32(largest))
    moved = wanted.astype(ml_dtypes.float8_e4m3fn)
    if not (lost := np.count_nonzero(moved.astype(np.float32) != wanted)):
        return replace(packed, scales=moved.view(np.uint8), tensor_scale=np.array(largest, np.float32))
    raise ArtifactError(
        f"{where}: {lost} block scales are no e4m3 under the tensor scale {largest:g}, which servers keep for it and the weights "
        "that they fuse it with: quantize the float model again"
    )
