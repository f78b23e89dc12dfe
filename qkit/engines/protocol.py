"""The seam: the verbs of an engine, in one protocol for each thing it can offer. The rest of qkit is written over them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer, Mode
from qkit.engines.trainer import AdamWOptions, Trainer, TrainerOptions
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Kind, Rule, Ste

if TYPE_CHECKING:
    from qkit.reference.merged import Update

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """The description of a backend; its class is imported on first use.

    Attributes:
        name: the name by which users choose it.
        target: `package.module:Class`, called without arguments.
        framework: the import name of the package whose arrays and modules it works on, such as `torch`.
        install: the command that installs it, such as `pip install NAME`.
        requires: other importable packages it needs.
    """

    name: str
    target: str
    framework: str
    install: str
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        texts = (self.name, self.target, self.framework, self.install, *self.requires)
        if not all(isinstance(text, str) and text for text in texts) or self.target.count(":") != 1:
            raise BackendError(f"{self!r}: want texts that are not empty, and a target package.module:Class")


class Arrays(Protocol):
    """Operations on arrays. Every engine offers these nine verbs; `qkit.engines.numpy.NumpyBackend` is one to start from."""

    name: str
    framework: str

    def on(self, device: str) -> Self:
        """This engine with `device` (`cpu`, `cuda`, ...) for its new arrays.

        Raises:
            BackendError: this machine has no such device.
        """
        ...

    def quantize(self, w: Any, grid: Grid, *, peak: float | None = None) -> QTensor[Any]:
        """Codes and scales of finite `w` [..., n]; `reference.quantize`, bit for bit.

        Args:
            peak: `nvfp4` only: the largest magnitude of all weights that share the tensor scale; see `qkit.fused`.
        """
        ...

    def dequantize(self, q: QTensor[Any]) -> Any:
        """The values [..., n] in `q.dtype`; `reference.dequantize`, bit for bit."""
        ...

    def fake_quantize(self, w: Any, grid: Grid, *, ste: Ste = "identity", scales: Any = None, zeros: Any = None) -> Any:
        """`dequantize(quantize(w, grid))` without the codes; `reference.fake_quantize`, bit for bit.

        The gradient with respect to `w` is the identity. If `ste` is "masked", it is zero outside `unclipped`.
        Static quantization passes `scales` and `zeros`; otherwise they follow from `w`.
        """
        ...

    def unclipped(self, w: Any, grid: Grid, *, scales: Any = None, zeros: Any = None) -> Any:
        """True where `w` is not clipped; `reference.unclipped`."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of arrays to tuples of arrays, under the engine's compiler; `function` itself without one."""
        ...

    def from_numpy(self, x: NDArray[Any]) -> Any:
        """The engine's array with the bits of `x`."""
        ...

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """`x` as NumPy with the same bits; bfloat16 through ml_dtypes."""
        ...

    def magnitude(self, x: Any) -> float:
        """Largest magnitude in `x`; NaN if there is a NaN."""
        ...


class Modules(Arrays, Protocol):
    """Layers of models: prepare, convert, save and load. `tests/plugins/toy` is a small engine that offers them.

    Attributes:
        recipe_keys: the keys of a rule that the engine honours, besides `qkit.rules.CORE_KEYS`, such as `activation`. Recipes
            with any other key are refused. An engine without this attribute honours none.
    """

    recipe_keys: frozenset[str]

    def layers(self, model: Any) -> Iterable[Layer]:
        """Every layer that a rule could match, each module once, in the order of the model."""
        ...

    def weight(self, module: Any) -> Any:
        """The master weight of a float or prepared layer."""
        ...

    def make_layer(self, kind: Kind, weight: NDArray[Any]) -> Any:
        """The framework's own float layer, without bias, with this weight [outputs, inputs] in its type: for probes.

        Raises:
            BackendError: the framework has no layers of this kind.
        """
        ...

    def prepare_layer(self, module: Any, rule: Rule) -> Any:
        """A layer that computes with quantized weight, input and output as `rule` says; the master stays its parameter.

        Where the rule's range is static, the layer stores `input_range` or `output_range` among its tensors: float32 [2],
        the lowest and the highest value seen; (inf, -inf) at first.
        """
        ...

    def switch_mode(self, module: Any, mode: Mode) -> None:
        """Sets the mode of a prepared layer. Compiled functions obey, and compile once for each mode.

        `on` quantizes and `off` does not. `calibrating` quantizes weights only, and static ranges record inputs and outputs.
        """
        ...

    def clear_ranges(self, module: Any) -> None:
        """Empties the static ranges of a prepared layer."""
        ...

    def pack(
        self,
        module: Any,
        q: QTensor[Any],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,
        owner: Any = None,
    ) -> Any:
        """The converted layer with the codes of `q`, whose arrays are NumPy's or this engine's.

        Args:
            static: the scales of static activations, see `reference.ranges`, which the layer stores by these names.
            owner: the converted layer that `module` shares its weight with, if any; both then share one array of codes.
        """
        ...

    def unpack(self, module: Any) -> QTensor[Any]:
        """The codes and scales of a converted layer."""
        ...

    def replace(self, model: Any, modules: Mapping[str, Any]) -> Any:
        """`model` with the module at each path replaced under every path; in place, unless it is the root."""
        ...

    def run_layer(self, module: Any, x: NDArray[Any]) -> NDArray[Any]:
        """The output of `module` for `x` in evaluation mode: numbers [..., inputs], or for an embedding tokens [...]."""
        ...

    def tensors(self, model: Any) -> dict[str, Any]:
        """Every stored array of the model by name, each once, except the quantized weights of converted layers."""
        ...

    def fill(self, model: Any, tensors: Mapping[str, NDArray[Any]], *, without: Collection[str] = ()) -> None:
        """Copies `tensors` into those of `tensors(model)`, except the names in `without`. An error leaves the model unchanged.

        Raises:
            ArtifactError: a name, a shape or a type does not fit, or one is missing. float16 and bfloat16 fit a float32 model.
        """
        ...

    def gather(self, model: Any) -> Any:
        """The whole of a sharded model in process 0, on the CPU, and None in the others; `model` itself if it is whole."""
        ...

    def config(self, model: Any) -> dict[str, Any] | None:
        """The Hugging Face configuration of the model, or None if it carries none."""
        ...


class Fuses(Modules, Protocol):
    """Layers that share a tensor scale while they train, since servers run them as one layer; see `qkit.fused`."""

    def fuse(self, modules: Sequence[Any]) -> None:
        """Has layers share one tensor scale, that of their largest magnitude, wherever their grids have one (`nvfp4`).

        The layers are prepared, or converted with adapters. They then compute with the values of `quantize(w, grid, peak=...)`,
        where `peak` is the largest magnitude of the current weights, merged ones, of those layers that are on such a grid. Deep
        copies of a model share among themselves.
        """
        ...


class Adapts(Modules, Protocol):
    """Low-rank adapters on prepared and converted layers."""

    def adapt(self, module: Any, update: "Update") -> Any:
        """The layer, prepared or converted, with the arrays of `update` as float32 parameters: the only ones that train.

        It computes with the grid's value of `reference.merged.merged`, bit for bit. A prepared layer rounds the merged weight
        to the type of its master first. The gradient passes straight through the grid; DoRA takes a row's length as constant.
        """
        ...

    def adapter_update(self, module: Any) -> "Update":
        """The current adapter of an adapted layer."""
        ...

    def merge_adapter(self, module: Any) -> Any:
        """The prepared or converted layer whose weight is the merged one of an adapted layer: same codes, same output."""
        ...

    def train_only_adapters(self, model: Any) -> None:
        """Freezes every parameter of the model, except those of adapters."""
        ...


class Builds(Modules, Protocol):
    """Whole language models, from a Hugging Face configuration."""

    def build(self, config: Mapping[str, Any]) -> Any:
        """A freshly initialized model of the architecture that a Hugging Face configuration names.

        Raises:
            BackendError: the engine does not know it, or the library that builds it is missing.
        """
        ...

    def loss(self, model: Any, tokens: NDArray[np.int32], *, mask: NDArray[np.bool_] | None = None) -> float:
        """Mean next-token loss in nats over `tokens` [batch, length + 1], those in `mask` [batch, length], in evaluation mode."""
        ...

    def logits(self, model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] of the model in evaluation mode."""
        ...


class Trains(Builds, Protocol):
    """Training of language models, with schedules of the quantization."""

    def adamw(self, model: Any, options: AdamWOptions) -> Any:
        """The framework's AdamW over the trainable parameters; where it can, each step also writes the quantized values."""
        ...

    def trainer(self, model: Any, options: TrainerOptions) -> Trainer:
        """AdamW on the model's trainable parameters; matrices decay, vectors do not.

        Raises:
            BackendError: the engine or the model cannot do what an option asks for; the message names it.
        """
        ...

    def freeze_values(self, module: Any, on: bool) -> None:
        """With `on`, a prepared layer trains with the current values of its weight until the next call.

        Every call with `on` computes the values anew. Without, they follow the weight again, as they always do in evaluation
        mode. Compiled functions obey, and compile at most once more. Not for layers with adapters or learned scales.
        """
        ...

    def regrid(self, module: Any, rule: Rule) -> None:
        """Changes the rule of a prepared layer in place; parameters, their names and the optimizer's state stay.

        Compiled functions obey, and compile once for each rule. The new rule has the same kind and static ranges. Not for
        layers with adapters or learned scales.
        """
        ...


class Deploys(Modules, Protocol):
    """Conversion straight to the deployed layout, with no array of one byte for each code."""

    def deploy(self, layers: Sequence[tuple[Any, Rule, Mapping[str, NDArray[Any]]]]) -> Sequence[Any | None]:
        """For each layer the result of `pack` on the codes of its own weight, or None to leave it to `quantize` and `pack`.

        Weights that are not finite have no codes, and give None, too.

        Args:
            layers: of each the module, its rule, and the scales of its static activations.
        """
        ...
