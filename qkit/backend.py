"""The seam: what an engine must be able to do. Everything else in qkit is written once, over these verbs."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.recipe import Kind, Rule

Stage = Literal["float", "prepared", "converted"]


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A description of a backend; the class is imported when it is first used.

    Attributes:
        name: what users choose it by.
        target: `package.module:Class`, called without arguments.
        framework: the import name of the package whose arrays and modules it works on, such as `torch`.
        install: what to tell somebody who lacks it, such as `pip install 'qkit[torch]'`.
        requires: other importable packages it needs.
    """

    name: str
    target: str
    framework: str
    install: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of somebody's model, as a backend sees it.

    Attributes:
        path: dotted path of the module; the first, where it is registered more than once.
        kind: `linear` or `embedding`.
        shape: of the weight, (outputs, inputs).
        module: the framework's module itself.
        stage: `float`, `prepared` or `converted`.
        rule: what it was prepared or converted with.
        execution: how a converted layer runs: natively, and on which container, or decoded first.
        obstacle: why it cannot be quantized although it looks like a layer; empty where it can.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    module: Any
    stage: Stage = "float"
    rule: Rule | None = None
    execution: str = ""
    obstacle: str = ""


class Trainer(Protocol):
    """A model, its optimizer and the step that joins them."""

    def step(self, tokens: NDArray[np.int32], *, learning_rate: float) -> float:
        """One step on next-token loss over `tokens` [batch, length + 1]; returns the loss before it, in nats.

        AdamW with betas 0.9 and 0.95; the gradient's norm is clipped at 1; matrices decay, vectors do not.
        """
        ...


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

    def fake_quantize(self, w: Any, grid: Grid) -> Any:
        """`dequantize(quantize(w, grid))` without the codes; its gradient with respect to `w` is the identity."""
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

    def fake(self, module: Any, rule: Rule) -> Any:
        """A layer that computes with the values `rule` gives its weight and input; the master weight stays its parameter."""
        ...

    def pack(self, module: Any, q: QTensor[Any], rule: Rule) -> Any:
        """The layer in its deployed form, holding the codes of `q` (arrays of this engine or of NumPy)."""
        ...

    def unpack(self, module: Any) -> QTensor[Any]:
        """The codes and scales that a converted layer holds."""
        ...

    def replace(self, model: Any, modules: Mapping[str, Any]) -> Any:
        """`model` with the module at each path replaced, wherever it is registered; in place, unless it is the root."""
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

    def config(self, model: Any) -> dict[str, Any] | None:
        """The Hugging Face configuration that the model carries, if it carries one."""
        ...

    def build(self, config: Mapping[str, Any]) -> Any:
        """A model of the architecture that a Hugging Face configuration names, freshly initialised."""
        ...

    # training

    def trainer(self, model: Any, *, weight_decay: float) -> Trainer:
        """AdamW on the model's trainable parameters."""
        ...

    def loss(self, model: Any, tokens: NDArray[np.int32]) -> float:
        """Mean next-token loss over `tokens` [batch, length + 1] in nats, with the model in evaluation mode."""
        ...

    def logits(self, model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] of the model in evaluation mode."""
        ...
