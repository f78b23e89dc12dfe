"""disable, enable and calibrating: the modes of a prepared model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from qkit.engines.layer import Layer, Mode
from qkit.engines.protocol import Arrays, Modules
from qkit.errors import StageError
from qkit.pipeline import surgeon


def disable(model: Any, match: str = "*", *, backend: str | Arrays | None = None) -> None:
    """Switches the prepared layers whose path matches the shell pattern to float, until `enable`.

    Compiled functions obey, mostly without another compilation. On MLX the model's state must be among their inputs, as it
    is in training steps. Training then trains the float weights; `convert` quantizes these layers all the same.

    Raises:
        StageError: no prepared layer matches, or one is being calibrated.
    """
    _switch(model, match, "off", backend)


def enable(model: Any, match: str = "*", *, backend: str | Arrays | None = None) -> None:
    """The inverse of `disable`."""
    _switch(model, match, "on", backend)


@contextmanager
def disabled(model: Any, match: str = "*", *, backend: str | Arrays | None = None) -> Iterator[None]:
    """`disable` inside the block, for example to evaluate the float model in mid-training."""
    with _switched(model, "off", lambda layer: fnmatchcase(layer.path, match), f"matches {match!r}", backend):
        yield


@contextmanager
def calibrating(model: Any, *, all_experts: bool = False, backend: str | Arrays | None = None) -> Iterator[None]:
    """Clears the static activation ranges of the prepared model, and records new ones inside the block.

    Run representative data through `model` there. Its weights are quantized, its activations not yet. `all_experts` shows every
    token to every expert of a mixture, for its ranges alone: outputs stay those of the experts that the router chose.

    Raises:
        StageError: no prepared layer has a static range, or with `all_experts` no experts have one; or the model is being
            calibrated already.
    """
    engine = surgeon(model, backend)
    layers = _prepared(engine, model, _static, "has a static range to calibrate")
    if all_experts and not any(layer.kind == "experts" for layer in layers):
        raise StageError(
            f"all_experts=True is for experts with static ranges, and this model has none on {engine.name}: leave it out"
        )
    for layer in layers:
        if layer.mode == "calibrating":
            raise StageError(f"{layer.path} is being calibrated already: one block of qkit.calibrating at a time")
        engine.clear_ranges(layer.module)
        if layer.kind == "experts":
            layer.module.all_experts = all_experts
    with _switched(model, "calibrating", _static, "has a static range to calibrate", backend):
        yield


def _static(layer: Layer) -> bool:
    return layer.rule is not None and layer.rule.range != "dynamic"


@contextmanager
def _switched(
    model: Any, mode: Mode, chosen: Callable[[Layer], bool], what: str, backend: str | Arrays | None
) -> Iterator[None]:
    engine = surgeon(model, backend)
    layers = _prepared(engine, model, chosen, what)
    for layer in layers:
        engine.switch_mode(layer.module, mode)
    try:
        yield
    finally:
        for layer in layers:
            engine.switch_mode(layer.module, layer.mode)


def _switch(model: Any, match: str, mode: Mode, backend: str | Arrays | None) -> None:
    engine = surgeon(model, backend)
    layers = _prepared(engine, model, lambda layer: fnmatchcase(layer.path, match), f"matches {match!r}")
    for layer in layers:
        if layer.mode == "calibrating":
            raise StageError(f"{layer.path} is being calibrated: switch it before or after, or use qkit.disabled")
    for layer in layers:
        engine.switch_mode(layer.module, mode)


def _prepared(engine: Modules, model: Any, chosen: Callable[[Layer], bool], what: str) -> list[Layer]:
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    if not layers:
        raise StageError("no layer of this model is prepared: call prepare(model, recipe) first")
    if found := [layer for layer in layers if chosen(layer)]:
        return found
    raise StageError(f"no prepared layer {what}: there is {', '.join(layer.path for layer in layers[:4])}")
