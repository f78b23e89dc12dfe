"""A layer of somebody's model, as a backend shows it to the core."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qkit.errors import StageError
from qkit.rules import Kind, Rule

Stage = Literal["float", "prepared", "converted"]
Mode = Literal["on", "off", "calibrating"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of somebody's model, as a backend sees it.

    Attributes:
        path: dotted path of the module; the first, where it is registered more than once. Of an `other`, the name of a tensor.
        kind: `linear` or `embedding`; `other` is a weight that no rule speaks of, listed so that coverage is complete.
        shape: of the weight, (outputs, inputs).
        module: the framework's module itself.
        stage: `float`, `prepared` or `converted`.
        rule: what it was prepared or converted with.
        mode: of a prepared layer, as `Modules.switch_mode` left it.
        native: whether a converted layer runs on the engine's own quantized tensor or layer, rather than decoded first.
        execution: on which one; or, decoded first, why.
        tied: path of the layer before it whose weight is also its own; empty where there is none.
        obstacle: why it cannot be quantized although it looks like a layer, or, of an `other`, why no rule speaks of it.
        adapter: its kind and rank, where it has one; see `qkit.adapters`.
        sharded: whether this process has only a part of the weight, or is lent the whole for as long as the layer computes.
    """

    path: str
    kind: Kind | Literal["other"]
    shape: tuple[int, ...]
    module: Any
    stage: Stage = "float"
    rule: Rule | None = None
    mode: Mode = "on"
    native: bool = False
    execution: str = ""
    tied: str = ""
    obstacle: str = ""
    adapter: str = ""
    sharded: bool = False


def want_merged(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers with adapters, which are not in the weights that they hold."""
    for layer in layers:
        if layer.adapter:
            raise StageError(
                f"cannot {verb}: {layer.path} has an adapter ({layer.adapter}); call qkit.merge(model) first"
            )


def want_whole(layers: Iterable[Layer], verb: str) -> None:
    """Refuses layers whose weights are spread over processes."""
    for layer in layers:
        if layer.sharded:
            way_out = (
                f"{verb} the model first and shard it then"
                if layer.stage == "float" or verb == "adapt"
                else "call whole = qkit.gather(model) in every process, and go on with the whole model in the one that gets it"
            )
            raise StageError(f"cannot {verb}: {layer.path} is sharded over processes; {way_out}")
