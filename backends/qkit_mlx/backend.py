"""The MLX engine: every verb of `qkit.engines.protocol`, in the order of the protocols."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from qkit.engines.elsewhere import Remembers, Restores
from qkit.engines.layer import Layer, Mode
from qkit.engines.mixtures import TrainsExperts
from qkit.engines.protocol import NOTHING, Adapts, Fuses, Trains
from qkit.engines.trainer import AdamWOptions, Trainer, TrainerOptions
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.installation import how_to_install
from qkit.qtensor import QTensor
from qkit.reference.merged import Update
from qkit.rules import Kind, Rule, Ste
from qkit_mlx.arithmetic import rounding
from qkit_mlx.kernels import choose
from qkit_mlx.layers import adapted, converted, experts, fused, latent, learned, prepared, straight_through
from qkit_mlx.models import groups, mapped, norms, places, surgery
from qkit_mlx.models.elsewhere import Elsewhere
from qkit_mlx.models.mixtures import Mixtures
from qkit_mlx.training import trainer
from qkit_mlx.training.adamw import AdamW
from qkit_mlx.training.tuning import Tuning


class MlxBackend(Elsewhere, Mixtures, norms.Norms, Tuning):
    """MLX: Apple silicon, and CPUs anywhere."""

    name = "mlx"
    framework = "mlx"
    recipe_keys = frozenset({"activation", "output", "range", "ste", "scales"})

    # Arrays

    def on(self, device: str) -> Self:
        """See `Arrays.on`: MLX's default device, by the name of its kind. Only the user changes it.

        Raises:
            BackendError: it is another; the message says how to change it.
        """
        kind = mx.default_device().type.name
        maker = "metal" if mx.metal.is_available() else "cuda"
        if device != kind and (kind, device) != ("gpu", maker):
            raise BackendError(
                f"MLX works on {kind} in this process, not on {device!r}: call mx.set_default_device(mx.cpu) or "
                "mx.set_default_device(mx.gpu) first"
            )
        return self

    def quantize(self, w: mx.array, grid: Grid, *, peak: float | None = None) -> QTensor[mx.array]:
        """See `Arrays.quantize`."""
        return choose.quantize(w, grid, peak=None if peak is None else mx.array(peak, mx.float32))

    def dequantize(self, q: QTensor[mx.array]) -> mx.array:
        """See `Arrays.dequantize`."""
        return rounding.dequantize(q)

    def fake_quantize(
        self,
        w: mx.array,
        grid: Grid,
        *,
        ste: Ste = "identity",
        scales: mx.array | None = None,
        zeros: mx.array | None = None,
    ) -> mx.array:
        """See `Arrays.fake_quantize`."""
        return straight_through.fake_quantize(w, grid, ste=ste, scales=scales, zeros=zeros)

    def unclipped(
        self, w: mx.array, grid: Grid, *, scales: mx.array | None = None, zeros: mx.array | None = None
    ) -> mx.array:
        """See `Arrays.unclipped`."""
        return rounding.unclipped(w, grid, scales=scales, zeros=zeros)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` under `mx.compile`."""
        compiled: Callable[..., Any] = mx.compile(function)
        return compiled

    def from_numpy(self, x: NDArray[Any]) -> mx.array:
        """See `Arrays.from_numpy`."""
        x = np.asarray(x)  # NumPy makes scalars of arrays without axes
        if x.dtype == ml_dtypes.bfloat16:
            return mx.array(x.view(np.uint16)).view(mx.bfloat16)
        if x.dtype == np.float64:
            return mx.array(x, dtype=mx.float64)  # MLX would make it float32
        return mx.array(x)

    def to_numpy(self, x: mx.array) -> NDArray[Any]:
        """See `Arrays.to_numpy`."""
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(x)

    def magnitude(self, x: mx.array) -> float:
        """See `Arrays.magnitude`."""
        return choose.magnitude(x)

    # Modules

    def layers(self, model: nn.Module) -> Iterable[Layer]:
        """See `Modules.layers`."""
        return surgery.layers(model)

    def weight(self, module: Any) -> mx.array:
        """See `Modules.weight`."""
        weight: mx.array = latent.weight_of(module) if isinstance(module, latent.Halves) else module["weight"]
        return weight

    def make_layer(self, kind: Kind, weight: NDArray[Any]) -> nn.Module:
        """See `Modules.make_layer`."""
        outputs, inputs = weight.shape
        layer = nn.Embedding(outputs, inputs) if kind == "embedding" else nn.Linear(inputs, outputs, bias=False)
        layer.weight = self.from_numpy(weight)
        return layer

    def prepare_layer(self, module: Any, rule: Rule) -> Any:
        """See `Modules.prepare_layer`."""
        if isinstance(module, latent.Halves):
            return latent.prepare_halves(module, rule)
        if rule.kind == "experts":
            return experts.prepare_experts(module, rule)
        return learned.prepare_layer(module, rule)

    def switch_mode(self, module: Any, mode: Mode) -> None:
        """See `Modules.switch_mode`."""
        for layer in groups.modules_of(module):
            prepared.switch_mode(layer, mode)

    def clear_ranges(self, module: Any) -> None:
        """See `Modules.clear_ranges`."""
        for layer in groups.modules_of(module):
            prepared.clear_ranges(layer)

    def pack(
        self,
        module: Any,
        q: QTensor[Any],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,
        owner: Any = None,  # never given: here a head that shares the embedding's weight is its method `as_linear`
    ) -> Any:
        """See `Modules.pack`."""
        here = q.map(self.array_of)
        if isinstance(module, latent.Halves):
            return latent.pack_halves(module, here, rule)
        if isinstance(module, nn.Embedding):
            return converted.pack_embedding(here, rule)
        scales = {name: self.from_numpy(array) for name, array in static.items()}
        return converted.pack_linear(here, rule, bias=module.get("bias"), static=scales)

    def unpack(self, module: Any) -> QTensor[mx.array]:
        """See `Modules.unpack`."""
        return latent.unpack_halves(module) if isinstance(module, latent.Halves) else converted.unpack(module)

    def replace(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
        """See `Modules.replace`."""
        return surgery.replace(model, modules)

    def run_layer(self, module: nn.Module, x: NDArray[Any]) -> NDArray[Any]:
        """See `Modules.run_layer`."""
        with trainer.evaluating(module):
            return self.to_numpy(module(self.from_numpy(x)))

    def tensors(self, model: nn.Module) -> dict[str, mx.array]:
        """See `Modules.tensors`."""
        return surgery.tensors(model)

    def fill(self, model: nn.Module, tensors: Mapping[str, NDArray[Any]], *, without: Collection[str] = ()) -> None:
        """See `Modules.fill`; where models are maps, arrays are not read yet."""
        if self.maps and not without:
            mapped.fill(model, mapped.Files(tensors, self.from_numpy))
        else:
            surgery.fill(model, {name: self.from_numpy(array) for name, array in tensors.items()}, without=without)

    def gather(self, model: nn.Module) -> nn.Module:
        """See `Modules.gather`: MLX's models are whole."""
        return model

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        """See `Modules.config`: that of models built here; `mlx_lm.load` keeps none on its models."""
        return getattr(model, "qkit_config", None)

    # Fuses

    def fuse(self, modules: Sequence[Any]) -> None:
        """See `Fuses.fuse`."""
        fused.fuse(modules)

    # Adapts

    def adapt(self, module: Any, update: Update) -> nn.Module:
        """See `Adapts.adapt`; the parameters are named as in mlx-lm, `lora_a` [inputs, rank] and so on."""
        made: nn.Module = adapted.adapt(module, update)
        return made

    def adapter_update(self, module: Any) -> Update:
        """See `Adapts.adapter_update`."""
        return adapted.adapter_update(module)

    def merge_adapter(self, module: Any) -> nn.Module:
        """See `Adapts.merge_adapter`."""
        made: nn.Module = adapted.merge_adapter(module)
        return made

    def train_only_adapters(self, model: nn.Module) -> None:
        """See `Adapts.train_only_adapters`."""
        adapted.train_only_adapters(model)

    # Builds

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """See `Builds.build`; through mlx-lm, which needs no folder.

        Raises:
            BackendError: mlx-lm is missing, or has no such architecture.
        """
        try:
            from qkit_mlx.models import huggingface
        except ModuleNotFoundError as error:
            if error.name != "mlx_lm":
                raise
            raise BackendError(f"building a Hugging Face model needs mlx-lm: {how_to_install('mac')}") from None
        return huggingface.build(config)

    def loss(self, model: nn.Module, tokens: NDArray[np.int32], *, mask: NDArray[np.bool_] | None = None) -> float:
        """See `Builds.loss`."""
        return trainer.loss(model, tokens, mask=mask)

    def logits(self, model: nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Builds.logits`."""
        return trainer.logits(model, tokens)

    # Translates

    def translate(
        self, model: nn.Module, stored: Mapping[str, NDArray[Any]], codes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """See `Translates.translate`; by the model's `sanitize`, which `fill` calls for the tensors."""
        shapes = {name: array.shape for name, array in stored.items()}
        known = {layer.path for layer in self.layers(model)}
        return dict(stored), places.places(model, shapes, codes, known=known)

    # Trains

    def adamw(self, model: nn.Module, options: AdamWOptions) -> AdamW:
        """See `Trains.adamw`; for `optimizer.update(model, gradients)`. A rate may also be one of MLX's schedules."""
        optimizer = AdamW(
            learning_rate=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            offset_learning_rate=options.offset_learning_rate,
        )
        optimizer.init(model.trainable_parameters())
        return optimizer

    def trainer(self, model: nn.Module, options: TrainerOptions) -> Trainer:
        """See `Trains.trainer`."""
        return trainer.MlxTrainer(self, model, options)

    def freeze_values(self, module: Any, on: bool) -> None:
        """See `Trains.freeze_values`."""
        for layer in groups.modules_of(module):
            prepared.freeze_values(layer, on)

    def regrid(self, module: Any, rule: Rule) -> None:
        """See `Trains.regrid`."""
        for layer in groups.modules_of(module):
            prepared.regrid(layer, rule)


if TYPE_CHECKING:
    _engine = MlxBackend()
    _offered: tuple[Fuses, Adapts, Trains, TrainsExperts, Restores, Remembers] = (
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
    )  # mypy compares every verb with the protocols
