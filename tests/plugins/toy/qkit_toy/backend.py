"""A backend for `toyframe`: the reference's arithmetic through the bridge, and surgery on its modules."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from toyframe import Linear, Module, Tensor

import qkit
from qkit.engines.layer import Layer, Mode
from qkit.engines.numpy import NumpyBackend
from qkit.errors import ArtifactError, BackendError
from qkit.qtensor import QTensor
from qkit.rules import Kind, Rule


class PreparedLinear(Linear):
    """A linear layer that computes with the quantized values of its weight; the master stays where it was."""

    rule: Rule
    mode: Mode = "on"

    def __call__(self, x: Tensor) -> Tensor:
        if self.mode == "off":
            return super().__call__(x)
        return Linear(qkit.fake_quantize(self.weight, self.rule.weight), self.bias)(x)


class PackedLinear(Module):
    """A linear layer that holds codes, and decodes them at every call."""

    def __init__(self, q: QTensor[Tensor], bias: Tensor, rule: Rule) -> None:
        self.q, self.bias, self.rule = q, bias, rule

    def __call__(self, x: Tensor) -> Tensor:
        return Linear(qkit.dequantize(self.q), self.bias)(x)


class ToyBackend(NumpyBackend):
    """`Arrays` by the reference, with the two verbs of the bridge; and `Modules`.

    It declares no recipe keys, so that qkit refuses recipes with activations, learned scales and so on.
    """

    name = "toy"
    framework = "toyframe"

    def from_numpy(self, x: NDArray[Any]) -> Tensor:
        return Tensor(x)

    def to_numpy(self, x: Any) -> NDArray[Any]:
        return x.array if isinstance(x, Tensor) else np.asarray(x)

    def layers(self, model: Module) -> Iterable[Layer]:
        for path, module in _walk(model, ""):
            if isinstance(module, PackedLinear):
                yield Layer(path, "linear", module.q.shape, module, "converted", module.rule, execution="one product")
            elif isinstance(module, Linear):
                stage = "prepared" if isinstance(module, PreparedLinear) else "float"
                rule, mode = getattr(module, "rule", None), getattr(module, "mode", "on")
                yield Layer(path, "linear", module.weight.shape, module, stage, rule, mode)

    def weight(self, module: Linear) -> Tensor:
        return module.weight

    def make_layer(self, kind: Kind, weight: NDArray[Any]) -> Linear:
        if kind != "linear":
            raise BackendError(f"toyframe has no {kind} layers")
        return Linear(Tensor(weight), Tensor(np.zeros(len(weight), weight.dtype)))

    def prepare_layer(self, module: Linear, rule: Rule) -> PreparedLinear:
        layer = PreparedLinear(module.weight, module.bias)
        layer.rule = rule
        return layer

    def switch_mode(self, module: PreparedLinear, mode: Mode) -> None:
        module.mode = mode

    def clear_ranges(self, module: PreparedLinear) -> None:
        """Nothing: without the recipe key `range` no layer has a static range."""

    def run_layer(self, module: Module, x: NDArray[Any]) -> NDArray[Any]:
        return self.to_numpy(module(Tensor(x)))

    def pack(self, module: Linear, q: QTensor[Any], rule: Rule, **_: Any) -> PackedLinear:
        return PackedLinear(q.map(self.to_numpy).map(self.from_numpy), module.bias, rule)

    def unpack(self, module: PackedLinear) -> QTensor[Any]:
        return module.q

    def replace(self, model: Module, modules: Mapping[str, Module]) -> Module:
        instead = {id(module): modules[path] for path, module in _walk(model, "") if path in modules}
        for _, parent in list(_walk(model, "")):
            for name, child in getattr(parent, "modules", {}).items():
                parent.modules[name] = instead.get(id(child), child)
        return instead.get(id(model), model)

    def tensors(self, model: Module) -> dict[str, Tensor]:
        slots = ((path, module, key) for path, module in _walk(model, "") for key in ("weight", "bias"))
        return {f"{path}.{key}".lstrip("."): getattr(at, key) for path, at, key in slots if hasattr(at, key)}

    def fill(self, model: Module, tensors: Mapping[str, NDArray[Any]], *, without: Collection[str] = ()) -> None:
        mine = {name: tensor for name, tensor in self.tensors(model).items() if name not in without}
        have, given = ({name: x.shape for name, x in side.items()} for side in (mine, tensors))
        if have != given:
            raise ArtifactError(f"the model has {have}, and was given {given}")
        for name, tensor in mine.items():
            tensor.array = tensors[name]

    def gather(self, model: Module) -> Module:
        return model  # models of toyframe are never sharded

    def config(self, model: Module) -> None:
        return None


def _walk(module: Module, path: str) -> Iterable[tuple[str, Module]]:
    """Every module once, at its first path."""
    found = {id(module): (path, module)}
    for name, child in getattr(module, "modules", {}).items():
        for below, grandchild in _walk(child, f"{path}.{name}".lstrip(".")):
            found.setdefault(id(grandchild), (below, grandchild))
    return found.values()
