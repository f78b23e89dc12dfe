"""The seam: what an engine must be able to do. Everything else in qkit is written once, over these verbs."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer, Mode
from qkit.engines.trainer import OFFSET_RATE, Distillation, Trainer
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Kind, Rule, Ste

if TYPE_CHECKING:
    from qkit.adapters.update import Update

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A description of a backend; the class is imported when it is first used.

    Attributes:
        name: what users choose it by.
        target: `package.module:Class`, called without arguments.
        framework: the import name of the package whose arrays and modules it works on, such as `torch`.
        install: what to tell somebody who lacks it, such as `pip install NAME`.
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


class Backend(Protocol):
    """An engine: operations on its arrays, and surgery on its modules. `tests/plugins/toy` is a small one, whole."""

    name: str
    framework: str

    def on(self, device: str) -> "Backend":
        """This engine, making its arrays on `device` (`cpu`, `cuda`, ...).

        Raises:
            BackendError: there is no such device here.
        """
        ...

    # operations on arrays

    def quantize(self, w: Any, grid: Grid) -> QTensor[Any]:
        """Codes and scales of finite `w` [..., n]; `reference.quantize`, bit for bit."""
        ...

    def dequantize(self, q: QTensor[Any]) -> Any:
        """The values [..., n] in `q.dtype`; `reference.dequantize`, bit for bit."""
        ...

    def fake_quantize(self, w: Any, grid: Grid, *, ste: Ste = "identity", scales: Any = None, zeros: Any = None) -> Any:
        """`dequantize(quantize(w, grid))` without the codes; `reference.fake_quantize`, bit for bit.

        The gradient with respect to `w` is the identity, or, if `ste` is "masked", that where `unclipped` and zero elsewhere.
        `scales` and `zeros` are given where quantization is static.
        """
        ...

    def unclipped(self, w: Any, grid: Grid, *, scales: Any = None, zeros: Any = None) -> Any:
        """Where `w` is not clipped, as booleans; `reference.unclipped`."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of arrays to tuples of arrays, under the engine's compiler; itself where there is none."""
        ...

    # the bridge

    def from_numpy(self, x: NDArray[Any]) -> Any:
        """The engine's array with the bits of `x`."""
        ...

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """`x` as NumPy, bits kept; bfloat16 through ml_dtypes."""
        ...

    def magnitude(self, x: Any) -> float:
        """Largest magnitude in `x`; NaN if there is a NaN."""
        ...

    # surgery on modules

    def layers(self, model: Any) -> Iterable[Layer]:
        """Every layer that a rule could speak of, each module once, in the order of the model."""
        ...

    def weight(self, module: Any) -> Any:
        """The master weight of a float or prepared layer."""
        ...

    def make(self, kind: Kind, weight: NDArray[Any]) -> Any:
        """The framework's own float layer, without bias, with this weight [outputs, inputs] in its type: for probes."""
        ...

    def fake(self, module: Any, rule: Rule) -> Any:
        """A layer that computes with the values `rule` gives its weight, input and output; the master stays its parameter.

        Where the rule's range is static, the layer stores `input_range` or `output_range` among its tensors: float32 [2],
        the lowest and the highest value seen; (inf, -inf) at first.
        """
        ...

    def switch(self, module: Any, mode: Mode) -> None:
        """Turns the quantisation of a prepared layer on or off (compiled functions obey, and compile each once), or has its
        static ranges record what comes in and goes out, while weights are quantized and the rest is not.
        """
        ...

    def forget(self, module: Any) -> None:
        """Makes the static ranges of a prepared layer empty."""
        ...

    def hold(self, module: Any, on: bool) -> None:
        """Has a prepared layer train with the values that its weight has now, whatever becomes of it, until the next call.

        Called again, the values are made anew; without `on`, they follow the weight again. In evaluation mode they always do.
        Compiled functions obey, and compile once more at most. For layers without adapter that learn no scales.
        """
        ...

    def regrid(self, module: Any, rule: Rule) -> None:
        """Gives a prepared layer another rule in place; parameters, their names and the optimizer's state stay.

        Compiled functions obey, and compile once more for each rule. For layers without adapter, and for rules of the same kind
        with the same static ranges that learn no scales.
        """
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
        """The layer in its deployed form, holding the codes of `q` (arrays of this engine or of NumPy).

        Args:
            static: the scales of static activations, see `reference.ranges`: stored among the layer's tensors by these names.
            owner: the packed layer that `module` shares its weight with, if any: the codes are then the same arrays.
        """
        ...

    def unpack(self, module: Any) -> QTensor[Any]:
        """The codes and scales that a converted layer holds."""
        ...

    def replace(self, model: Any, modules: Mapping[str, Any]) -> Any:
        """`model` with the module at each path replaced, wherever it is registered; in place, unless it is the root."""
        ...

    def run(self, module: Any, x: NDArray[Any]) -> NDArray[Any]:
        """What `module` makes of `x` in evaluation mode: a layer of numbers [..., inputs], an embedding of tokens [...]."""
        ...

    # adapters, which an engine may lack

    def adapt(self, module: Any, update: "Update") -> Any:
        """The layer, prepared or converted, with the arrays of `update` as float32 parameters: the only ones that train.

        It computes with the grid's value of `adapters.arithmetic.merged`, bit for bit; in between, that is rounded to the type of
        a prepared layer's master. The gradient passes straight through the grid; a row's length counts as constant in DoRA.
        """
        ...

    def update(self, module: Any) -> "Update":
        """The adapter of an adapted layer, as it is now."""
        ...

    def merged(self, module: Any) -> Any:
        """The prepared or converted layer whose weight is the merged one of an adapted layer: same codes, same output."""
        ...

    def freeze(self, model: Any) -> None:
        """Has nothing in the model train any more, but adapters."""
        ...

    # whole models

    def tensors(self, model: Any) -> dict[str, Any]:
        """Every stored array of the model by name, each once, but for the quantized weights of converted layers."""
        ...

    def fill(self, model: Any, tensors: Mapping[str, NDArray[Any]], *, without: Collection[str] = ()) -> None:
        """Puts `tensors` where `tensors(model)` has them, but for the names in `without`: all of them or, on an error, none.

        Raises:
            ArtifactError: a name, a shape or a type does not fit, or one is missing. float16 and bfloat16 fit a float32 model.
        """
        ...

    def gather(self, model: Any) -> Any:
        """The whole of a sharded model in process 0, on the CPU, and None in the others; a model that is whole, as it is."""
        ...

    def config(self, model: Any) -> dict[str, Any] | None:
        """The Hugging Face configuration that the model carries, if it carries one."""
        ...

    def build(self, config: Mapping[str, Any]) -> Any:
        """A model of the architecture that a Hugging Face configuration names, freshly initialised."""
        ...

    # training

    def adamw(
        self,
        model: Any,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        offset_learning_rate: float = OFFSET_RATE,
    ) -> Any:
        """The framework's AdamW over the model's trainable parameters, which writes quantized values as it steps, if it can.

        `offset_learning_rate` is that of the parameters that `reference.learned.is_offset` names.
        """
        ...

    def trainer(
        self,
        model: Any,
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
        offset_ratio: float = 1.0,
        seed: int | None = None,
        autocast: bool = False,
        compiled: bool | None = None,
        recompute: bool = False,
        distillation: Distillation | None = None,
        teacher: Any = None,
    ) -> Trainer:
        """AdamW on the model's trainable parameters; matrices decay, vectors do not.

        Args:
            clip: the largest norm of the gradient, over all parameters; infinity does not clip.
            offset_ratio: the learning rate of what `reference.learned.is_offset` names, as a multiple of a step's learning rate.
            seed: what the engine's random numbers begin from, for dropout; None leaves them as they are.
            autocast: bfloat16 products over float32 masters.
            compiled: whether steps are compiled; None is as the engine likes.
            recompute: whether layers are computed once more going back, to save memory.
            distillation: None learns from the text alone.
            teacher: a model of this engine that logits come from; None where steps are given `targets`.

        Raises:
            BackendError: the engine or the model has no such thing; the message names it.
        """
        ...

    def loss(self, model: Any, tokens: NDArray[np.int32]) -> float:
        """Mean next-token loss over `tokens` [batch, length + 1] in nats, with the model in evaluation mode."""
        ...

    def logits(self, model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] of the model in evaluation mode."""
        ...


@runtime_checkable
class Deployer(Protocol):
    """What an engine may be able to do besides: to convert layers without ever holding a byte for each code."""

    def deploy(self, layers: Sequence[tuple[Any, Rule, Mapping[str, NDArray[Any]]]]) -> Sequence[Any | None]:
        """What `pack` makes of the codes of each layer's own weight; None where the engine packs what it has quantized.

        None stands for weights without codes, too, which are not finite.

        Args:
            layers: of each the module, its rule, and the scales of its static activations.
        """
        ...
