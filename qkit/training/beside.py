"""The two parts of training adapters on packed codes: first beside the decoded base, then on the grid.

A base that lies on its grid rounds small updates away. So the first part of a run trains the product of an adapter beside the
decoded base, as QLoRA does. In the second part the layers compute with the grid's values of the sum, at the rate times the factor
of the adapter.
"""

from collections.abc import Callable

from qkit.adapters.adapter import Adapter
from qkit.engines.layer import Layer
from qkit.engines.protocol import Trains


def steps_beside(adapter: Adapter | None, layers: list[Layer], steps: int) -> int:
    """How many of `steps` train beside the base, by `adapter.beside`: none without an adapter on linear layers of codes."""
    return int(adapter.beside * steps) if adapter and any(map(has_parts, layers)) else 0


def has_parts(layer: Layer) -> bool:
    """Whether a layer trains in two parts: a linear one of codes, with LoRA. Experts and DoRA train on the grid throughout."""
    return layer.adapter.startswith("lora") and layer.stage == "converted" and layer.kind == "linear"


def switching_parts(engine: Trains, layers: list[Layer], last: int) -> Callable[[int], None]:
    """A function to call before each step: it puts adapted layers of codes on their grid after step `last`, not before."""
    two = [layer.module for layer in layers if has_parts(layer)]
    known: list[bool | None] = [None]

    def before(step: int) -> None:
        on = step > last
        if known[0] != on:
            for module in two:
                engine.switch_mode(module, "on" if on else "off")
            known[0] = on

    return before


def factor_at(adapter: Adapter | None, layers: list[Layer], last: int, step: int) -> float:
    """The factor of the learning rate at `step`: that of the adapter after step `last`, for layers that train in two parts."""
    return adapter.factor if adapter and step > last and any(map(has_parts, layers)) else 1.0
