"""Packed codes and scales that FSDP2 gathers in the place of values, where links between nodes are slower than one pass.

Each process encodes its rows once a step. After each gather one pass decodes the codes to the very values that FSDP would have
gathered. Four bits in groups of 32 are 0.56 bytes a weight, where bfloat16 is two.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.engines.kept import Store
from qkit.grid import Grid
from qkit_torchao.arithmetic import packing, words
from qkit_torchao.cache import identity
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.kernels import choose

Parts = tuple[Tensor, ...]  #: packed codes, scales, and zero points if the grid has them; a row of each for each row


@dataclass(frozen=True, slots=True)
class Packed:
    """How gathered parts of codes become values [rows, inputs]."""

    grid: Grid
    inputs: int

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The values of gathered `parts`, in `dtype`."""
        codes, scales, *zeros = parts
        zero = zeros[0] if zeros else None
        return choose.values(codes, scales, zero, None, None, self.grid, inputs=self.inputs, dtype=dtype)


def encoded(shard: Tensor, layer: Any) -> tuple[Parts, Packed]:
    """The parts of `shard` as it is now, encoded anew when the weight has changed; and how they become values."""
    grid: Grid = layer.weight_grid
    kept = _kept.of(shard) or KeptOfTensor(shard, _kept)
    stamp = (grid, *identity.state(shard))
    parts = kept.current(stamp) if layer.training else None
    if parts is None:
        q = choose.quantize(shard.detach(), grid)
        codes = words.pack(packing.unsigned(q.codes, grid.element), grid.element.bits, words.unit(grid, q.shape[-1]))
        scales = q.scales.to(torch.bfloat16) if q.scales.is_floating_point() else q.scales  # on its grid, or NaN
        parts = kept.put((codes, scales, *([] if q.zeros is None else [q.zeros])), stamp)
    return parts, Packed(grid, shard.shape[-1])


_kept: Store[KeptOfTensor[Parts]] = Store()
