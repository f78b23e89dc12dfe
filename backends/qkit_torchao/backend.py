"""The torch engine: every verb of `qkit.engines.protocol`, in the order of the protocols."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.engines.elsewhere import Remembers, Restores
from qkit.engines.layer import Layer, Mode
from qkit.engines.mixtures import TrainsExperts
from qkit.engines.protocol import NOTHING, Adapts, Deploys, Fuses, Trains
from qkit.engines.trainer import AdamWOptions, Trainer, TrainerOptions
from qkit.engines.translation import Translates
from qkit.errors import ArtifactError, BackendError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.merged import Update
from qkit.rules import Kind, Rule, Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.kernels import choose
from qkit_torchao.layers import adapted, converted, fused, learned, learned_experts, straight_through
from qkit_torchao.models import gather, names, norms, surgery
from qkit_torchao.models.elsewhere import Elsewhere
from qkit_torchao.models.mixtures import Mixtures
from qkit_torchao.training import trainer
from qkit_torchao.training.adamw import AdamW
from qkit_torchao.training.tuning import Tuning


class TorchaoBackend(Elsewhere, Mixtures, norms.Norms, Tuning):
    """torch on CPU or CUDA; converted layers hold torchao's tensors."""

    name = "torchao"
    framework = "torch"
    recipe_keys = frozenset({"activation", "output", "range", "ste", "scales"})

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    # Arrays

    def on(self, device: str) -> Self:
        """See `Arrays.on`; `cpu`, `cuda`, `cuda:1` and whatever else torch names.

        Raises:
            BackendError: there is no such device here.
        """
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch has no device {device!r} here: {str(error).splitlines()[0]}") from None
        return type(self)(device)

    def quantize(self, w: Tensor, grid: Grid, *, peak: float | None = None) -> QTensor[Tensor]:
        """See `Arrays.quantize`."""
        shared = None if peak is None else torch.tensor(peak, dtype=torch.float32, device=w.device)
        return choose.quantize(w, grid, peak=shared)

    def dequantize(self, q: QTensor[Tensor]) -> Tensor:
        """See `Arrays.dequantize`."""
        return rounding.dequantize(q)

    def fake_quantize(
        self, w: Tensor, grid: Grid, *, ste: Ste = "identity", scales: Tensor | None = None, zeros: Tensor | None = None
    ) -> Tensor:
        """See `Arrays.fake_quantize`."""
        return straight_through.fake_quantize(w, grid, ste=ste, scales=scales, zeros=zeros)

    def unclipped(self, w: Tensor, grid: Grid, *, scales: Tensor | None = None, zeros: Tensor | None = None) -> Tensor:
        """See `Arrays.unclipped`."""
        return rounding.unclipped(w, grid, scales=scales, zeros=zeros)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile`, one graph or an error."""
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False)
        return compiled

    def from_numpy(self, x: NDArray[Any]) -> Tensor:
        """A tensor with the bits of `x`, on this backend's device."""
        x = np.array(x, order="C")
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        if x.dtype.name.startswith("float8"):
            return torch.from_numpy(x.view(np.uint8)).view(getattr(torch, x.dtype.name)).to(self.device)
        return torch.from_numpy(x).to(self.device)

    def to_numpy(self, x: Tensor) -> NDArray[Any]:
        """`x` as NumPy, from any device; bfloat16 through ml_dtypes."""
        x = x.detach().cpu().contiguous()
        if x.dtype == torch.bfloat16:
            import ml_dtypes

            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def magnitude(self, x: Tensor) -> float:
        """Largest magnitude in `x`; NaN if there is a NaN."""
        if not x.numel():
            return 0.0
        low, high = torch.aminmax(x.detach())  # which makes no copy
        return float(torch.maximum(-low, high))

    # Modules

    def layers(self, model: nn.Module) -> Iterator[Layer]:
        """See `Modules.layers`."""
        return surgery.layers(model)

    def weight(self, module: nn.Module) -> Tensor:
        """See `Modules.weight`."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight

    def make_layer(self, kind: Kind, weight: NDArray[Any]) -> nn.Module:
        """See `Modules.make_layer`."""
        parameter = nn.Parameter(self.from_numpy(weight))
        outputs, inputs = weight.shape
        layer = nn.Embedding(outputs, inputs) if kind == "embedding" else nn.Linear(inputs, outputs, bias=False)
        layer.weight = parameter
        return layer

    def prepare_layer(self, module: nn.Module, rule: Rule) -> nn.Module:
        """See `Modules.prepare_layer`."""
        if rule.kind == "experts":
            return learned_experts.prepare_experts(module, rule)
        made: nn.Module = learned.prepare_layer(module, rule)
        return made

    def switch_mode(self, module: Any, mode: Mode) -> None:
        """See `Modules.switch_mode`."""
        module.switch_mode(mode)

    def clear_ranges(self, module: Any) -> None:
        """See `Modules.clear_ranges`."""
        module.clear_ranges()

    def pack(
        self,
        module: nn.Module,
        q: QTensor[Any],
        rule: Rule,
        *,
        static: Mapping[str, NDArray[Any]] = NOTHING,
        owner: nn.Module | None = None,
    ) -> nn.Module:
        """See `Modules.pack`; the codes go to the layer's device."""
        device = self.weight(module).device
        scales = self._static(static, device)
        q = converted.unpack(owner) if owner else q.map(lambda array: self.tensor_of(array).to(device))
        made: nn.Module = converted.pack(module, q, rule, static=scales, owner=owner)
        return made

    def _static(self, static: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        return {name: self.tensor_of(array).to(device) for name, array in static.items()}

    def unpack(self, module: nn.Module) -> QTensor[Tensor]:
        """See `Modules.unpack`."""
        return converted.unpack(module)

    def replace(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
        """See `Modules.replace`; converted models of transformers' then save themselves as artifacts."""
        return self.save_as_artifact(surgery.replace(model, modules))

    def run_layer(self, module: nn.Module, x: NDArray[Any]) -> NDArray[Any]:
        """See `Modules.run_layer`."""
        with trainer.evaluating(module):
            return self.to_numpy(module(self.from_numpy(x)))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Modules.tensors`."""
        first: dict[int, str] = {}
        state = surgery.state(model)
        return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}

    def fill(self, model: nn.Module, tensors: Mapping[str, NDArray[Any]], *, without: Collection[str] = ()) -> None:
        """See `Modules.fill`."""
        whole = surgery.state(model)
        left_out = {id(whole[name]) for name in without if name in whole}  # under every name that shares them
        state = {name: tensor for name, tensor in whole.items() if id(tensor) not in left_out}
        filled = {id(state[name]) for name in tensors if name in state}
        for name, tensor in state.items():
            if id(tensor) not in filled:
                raise ArtifactError(f"{name} is in the model, and not in the file: {surgery.ALIKE}")
        for name, array in tensors.items():
            if name not in state:
                raise ArtifactError(f"{name} is in the file, and not in the model: {surgery.ALIKE}")
            want, dtype = state[name], str(state[name].dtype).rpartition(".")[2]
            if array.shape != tuple(want.shape):
                raise ArtifactError(f"{name} is {list(array.shape)}, the model's {list(want.shape)}: {surgery.ALIKE}")
            if array.dtype.name != dtype and (dtype != "float32" or array.dtype.name not in ("float16", "bfloat16")):
                raise ArtifactError(f"{name} is {array.dtype} in the file and {dtype} in the model: cast the model")
        with torch.no_grad():
            for name, array in tensors.items():
                self.give(state[name], array)

    def gather(self, model: nn.Module) -> nn.Module | None:
        """See `Modules.gather`."""
        return gather.gather(model)

    def config(self, model: nn.Module) -> dict[str, Any] | None:
        """The configuration of a transformers model."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "to_json_string"):
            return None
        return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}

    # Fuses

    def fuse(self, modules: Sequence[Any]) -> None:
        """See `Fuses.fuse`."""
        fused.fuse(modules)

    # Adapts

    def adapt(self, module: Any, update: Update) -> nn.Module:
        """See `Adapts.adapt`; the parameters are named as in peft, `lora_A` [rank, inputs] and so on."""
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
        """See `Builds.build`; by transformers."""
        from qkit_torchao.models import huggingface

        return self.mapped(config) if self.maps else huggingface.build(config).to(self.device)

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
        """See `Translates.translate`; by transformers' table of conversions."""
        return names.translate(model, stored, codes, to_tensor=self.from_numpy, to_array=self.to_numpy)

    # Trains

    def adamw(self, model: nn.Module, options: AdamWOptions) -> AdamW:
        """See `Trains.adamw`."""
        decay, rate = options.weight_decay, options.learning_rate
        groups = trainer.groups(model, weight_decay=decay, offset_learning_rate=options.offset_learning_rate)
        return AdamW(groups, lr=rate, betas=options.betas, eps=options.eps, weight_decay=decay)

    def trainer(self, model: nn.Module, options: TrainerOptions) -> Trainer:
        """See `Trains.trainer`."""
        return trainer.TorchTrainer(self, model, options)

    def freeze_values(self, module: Any, on: bool) -> None:
        """See `Trains.freeze_values`."""
        module.freeze_values(on)

    def regrid(self, module: Any, rule: Rule) -> None:
        """See `Trains.regrid`."""
        module.regrid(rule)

    # Deploys

    def deploy(self, layers: Sequence[tuple[nn.Module, Rule, Mapping[str, NDArray[Any]]]]) -> list[nn.Module | None]:
        """See `Deploys.deploy`; for weights on a GPU."""
        placed = [(module, rule, self._static(static, self.weight(module).device)) for module, rule, static in layers]
        return converted.deploy(placed)


if TYPE_CHECKING:
    _engine = TorchaoBackend()
    _offered: tuple[TrainsExperts, Fuses, Adapts, Trains, Deploys, Translates, Restores, Remembers] = (
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
        _engine,
    )  # mypy compares every verb with the protocols
