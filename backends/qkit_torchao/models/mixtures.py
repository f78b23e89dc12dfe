"""The verbs of `Mixes` and `TrainsExperts` for the torch engine, which inherits them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.engines.layer import Layer
from qkit.engines.protocol import NOTHING
from qkit.qtensor import QTensor
from qkit.reference.merged import Update
from qkit.rules import Rule
from qkit_torchao.layers import adapted_experts, learned_experts, packed_experts, stacks
from qkit_torchao.layers.expert_inputs import ranges_of


class Mixtures:
    """Mixtures of experts on an engine with `from_numpy` and `to_numpy`."""

    def from_numpy(self, x: NDArray[Any]) -> Tensor:
        """See `Arrays.from_numpy`."""
        raise NotImplementedError

    def to_numpy(self, x: Tensor) -> NDArray[Any]:
        """See `Arrays.to_numpy`."""
        raise NotImplementedError

    def tensor_of(self, array: Any) -> Tensor:
        """A tensor with the bits of `array`, or `array` itself where it is one."""
        return array if isinstance(array, Tensor) else self.from_numpy(np.asarray(array))

    def experts(self, module: nn.Module) -> dict[str, Tensor]:
        """See `Mixes.experts`; views of the parameters."""
        return stacks.split(module, stacks.stacks_of(module))

    def stack_experts(self, layer: Layer, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Mixes.stack_experts`."""
        parts = {name: self.tensor_of(array) for name, array in weights.items()}
        joined = stacks.join(stacks.stacks_of(layer.module), parts)
        return {name: self.to_numpy(joined[name.rpartition(".")[2]]) for name in layer.stored}

    def pack_experts(
        self,
        module: nn.Module,
        q: Mapping[str, Sequence[QTensor[Any]]],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,
    ) -> nn.Module:
        """See `Mixes.pack_experts`; the codes go to the device of the experts."""
        device = next(iter(self.experts(module).values())).device

        def place(one: QTensor[Any]) -> QTensor[Tensor]:
            return one.map(lambda array: self.tensor_of(array).to(device))

        placed = {name: list(map(place, each)) for name, each in q.items()}
        scales = {name: self.tensor_of(array).to(device) for name, array in static.items()}
        return packed_experts.pack_experts(module, placed, rule, scales)

    def expert_ranges(self, module: Any) -> dict[str, Tensor]:
        """See `Mixes.expert_ranges`."""
        return {name.removesuffix("_range"): module.get_buffer(name) for name in ranges_of(module.rule, module.stacks)}

    def expert_scales(self, module: Any) -> dict[str, Tensor]:
        """See `Mixes.expert_scales`."""
        return {name: module.get_buffer(name) for name in packed_experts.static_of(module)}

    def unpack_experts(self, module: Any) -> dict[str, list[QTensor[Tensor]]]:
        """See `Mixes.unpack_experts`."""
        return packed_experts.unpack_experts(module)

    # TrainsExperts

    def adapt_experts(self, module: Any, updates: Mapping[str, Update]) -> nn.Module:
        """See `TrainsExperts.adapt_experts`; the parameters are `gate_proj_lora_A` [experts, rank, inputs] and so on."""
        made: nn.Module = adapted_experts.adapt(module, updates)
        return made

    def expert_updates(self, module: Any) -> dict[str, Update]:
        """See `TrainsExperts.expert_updates`."""
        return adapted_experts.updates_of(module)

    def learned_experts(self, module: Any) -> dict[str, dict[str, Tensor]]:
        """See `TrainsExperts.learned_experts`."""
        return learned_experts.parameters_of(module)
