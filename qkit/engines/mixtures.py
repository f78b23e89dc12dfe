"""The protocol of engines that know mixtures of experts; the other protocols are in `protocol`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from qkit.engines.layer import Layer
from qkit.engines.protocol import NOTHING, Adapts, Modules
from qkit.qtensor import QTensor
from qkit.rules import Rule

if TYPE_CHECKING:
    from qkit.reference.merged import Update


class Mixes(Modules, Protocol):
    """Mixtures of experts: an engine whose `layers` have some of kind `experts`.

    All experts of a block are one layer, whatever modules hold them. Its `path` is that in transformers, whatever the engine
    calls it, and `Modules.replace` takes that path. `Modules.prepare_layer`, `switch_mode` and `clear_ranges` work on its module
    as on any other; `Modules.weight`, `pack` and `unpack` are not called for it. Routers are no layers: list them as `other`,
    with `qkit.experts.is_router`.

    Weights are by projection, by the names of `qkit.experts.PROJECTIONS`: [experts, outputs, inputs].
    """

    def experts(self, module: Any) -> dict[str, Any]:
        """The master weights of float or prepared experts, as arrays [experts, outputs, inputs]: views or copies."""
        ...

    def stack_experts(self, layer: Layer, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The arrays of `layer.stored`, by these names, that hold `weights` [experts, outputs, inputs]: inverse of `experts`."""
        ...

    def pack_experts(
        self,
        module: Any,
        q: Mapping[str, Sequence[QTensor[Any]]],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,
    ) -> Any:
        """The converted experts with the codes of `q`: by projection, one [outputs, inputs] for each expert.

        A forward decodes the experts that it uses, one at a time, unless a kernel multiplies their codes. Values and scales
        under `nvfp4`: gate and up of an expert share the tensor's scale.
        """
        ...

    def expert_ranges(self, module: Any) -> dict[str, Any]:
        """The ranges [experts, 2] that prepared experts have seen, by the names of `qkit.expert_inputs.slots`."""
        ...

    def expert_scales(self, module: Any) -> dict[str, Any]:
        """The arrays `static` that converted experts were packed with. `Modules.tensors` does not have them."""
        ...

    def unpack_experts(self, module: Any) -> dict[str, list[QTensor[Any]]]:
        """The codes and scales of converted experts: the inverse of `pack_experts`."""
        ...


class TrainsExperts(Mixes, Adapts, Protocol):
    """Adapters and learned scales of experts, each expert's its own. `Adapts.merge_adapter` takes experts with adapters, too."""

    def adapt_experts(self, module: Any, updates: "Mapping[str, Update]") -> Any:
        """As `Adapts.adapt`, for prepared or converted experts: by projection, the factors of all experts.

        A projection without an update stays as it is.
        """
        ...

    def expert_updates(self, module: Any) -> "dict[str, Update]":
        """The current adapters of adapted experts, by projection."""
        ...

    def learned_experts(self, module: Any) -> dict[str, dict[str, Any]]:
        """By projection, the parameters that prepared experts learn beside it, [experts, ...], see `qkit.reference.learned`."""
        ...
