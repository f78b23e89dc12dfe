"""The verbs of `Mixes` for the MLX engine, which inherits them."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer
from qkit.engines.protocol import NOTHING
from qkit.qtensor import QTensor
from qkit.rules import Rule
from qkit_mlx.layers import experts


class Mixtures:
    """Mixtures of experts on an engine with `from_numpy`."""

    def from_numpy(self, x: NDArray[Any]) -> mx.array:
        """See `Arrays.from_numpy`."""
        raise NotImplementedError

    def array_of(self, array: Any) -> mx.array:
        """An array of MLX with the bits of `array`, or `array` itself where it is one."""
        return array if isinstance(array, mx.array) else self.from_numpy(np.asarray(array))

    def experts(self, module: Any) -> dict[str, mx.array]:
        """See `Mixes.experts`; the parameters themselves."""
        return {name: part["weight"] for name, part in experts.parts(module).items()}

    def stack_experts(self, layer: Layer, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Mixes.stack_experts`."""
        return {name: weights[projection] for name, projection in zip(layer.stored, layer.projections, strict=True)}

    def pack_experts(
        self,
        module: Any,
        q: Mapping[str, Sequence[QTensor[Any]]],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,  # never given: `prepare_experts` refuses such a rule
    ) -> nn.Module:
        """See `Mixes.pack_experts`."""
        return experts.pack_experts(module, {name: [one.map(self.array_of) for one in q[name]] for name in q}, rule)

    def unpack_experts(self, module: Any) -> dict[str, list[QTensor[mx.array]]]:
        """See `Mixes.unpack_experts`."""
        return experts.unpack_experts(module)
