"""The verbs of `Mixes` and `TrainsExperts` for the MLX engine, which inherits them."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer
from qkit.engines.protocol import NOTHING
from qkit.qtensor import QTensor
from qkit.reference.learned import stored_names
from qkit.reference.merged import Update
from qkit.rules import Rule
from qkit_mlx.layers import adapted_experts, experts


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
        static: Mapping[str, NDArray[Any]] = NOTHING,
    ) -> nn.Module:
        """See `Mixes.pack_experts`."""
        here = {name: [one.map(self.array_of) for one in q[name]] for name in q}
        return experts.pack_experts(module, here, rule, {name: self.array_of(array) for name, array in static.items()})

    def expert_ranges(self, module: Any) -> dict[str, mx.array]:
        """See `Mixes.expert_ranges`."""
        return experts.ranges_of(module)

    def expert_scales(self, module: Any) -> dict[str, mx.array]:
        """See `Mixes.expert_scales`."""
        return experts.scales_of(module)

    def unpack_experts(self, module: Any) -> dict[str, list[QTensor[mx.array]]]:
        """See `Mixes.unpack_experts`."""
        return experts.unpack_experts(module)

    # TrainsExperts

    def adapt_experts(self, module: Any, updates: Mapping[str, Update]) -> nn.Module:
        """See `TrainsExperts.adapt_experts`; each stack has `lora_a` [experts, inputs, rank] and so on."""
        return adapted_experts.adapt(module, updates)

    def expert_updates(self, module: Any) -> dict[str, Update]:
        """See `TrainsExperts.expert_updates`."""
        return adapted_experts.updates_of(module)

    def learned_experts(self, module: Any) -> dict[str, dict[str, mx.array]]:
        """See `TrainsExperts.learned_experts`."""
        return {
            name: {key: part[key] for key in stored_names(part.rule.weight, part.rule.scales)}
            for name, part in experts.parts(module).items()
        }
