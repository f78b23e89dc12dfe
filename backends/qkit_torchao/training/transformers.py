"""A callback for transformers' Trainer, and for trainers built on it, as TRL's are: it prepares the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

import qkit
from qkit.coverage_table import Coverage
from qkit.errors import StageError
from qkit.rules import Recipe

log = logging.get_logger(__name__)


class QatCallback(TrainerCallback):
    """Prepares the trainer's model, if it is not yet, so that it trains on the grids of `recipe`.

    As `Trainer(..., callbacks=[QatCallback("int4-g64")])`, it prepares before the trainer shards, wraps or compiles the
    model; added later, when training begins. Checkpoints have the names of the float model. Where peft has put adapters, the base
    is prepared, under the paths it had without them, and adapters stay float. After training the model is still prepared:
    `qkit.save(qkit.convert(trainer.model), "out")`, or, if it is sharded, convert and save the result of `qkit.gather`.

    Attributes:
        coverage: the `qkit.coverage` of the prepared model; None before it is prepared.
    """

    def __init__(self, recipe: str | Path | Recipe, *, start: int = 0) -> None:
        """`start`: the number of steps of the optimizer, from the beginning of training, that compute in float."""
        self.recipe, self.start = recipe, start
        self.coverage: Coverage | None = None

    def on_init_end(self, *_: Any, model: Any = None, **more: Any) -> None:
        """Prepares before the trainer builds its optimizer."""
        self._prepare(model)

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: Any = None, **more: Any) -> None:
        """Prepares where the callback was added late, and switches off if the first steps are float."""
        self._prepare(model)
        self._switch(model, state.global_step)

    def on_step_begin(self, args: Any, state: Any, *_: Any, model: Any = None, **more: Any) -> None:
        """Turns quantization on at step `start`."""
        if state.global_step == self.start > 0:
            self._switch(model, state.global_step)

    def _prepare(self, model: Any) -> None:
        if self.coverage is not None:
            return
        if not any(row.state.startswith(PREPARED) for row in qkit.coverage(model).rows):
            with _without_adapters(model) as base:
                if qkit.prepare(base, self.recipe) is not base:
                    raise StageError(
                        "a model that is itself one layer is replaced: prepare it before its trainer is made"
                    )
        self.coverage = qkit.coverage(model)
        count = sum(row.state.startswith(PREPARED) for row in self.coverage.rows)
        log.info("%d layers train on their grids: %.2f bits per weight", count, self.coverage.bits_per_weight)

    def _switch(self, model: Any, step: int) -> None:
        if self.start:
            (qkit.enable if step >= self.start else qkit.disable)(model)


PREPARED = ("prepared", "calibrating")


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The base of a model of peft's, with the layers that adapters wrap in their old places; afterwards the adapters are back."""
    of_peft: Any = model
    base: nn.Module = of_peft.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped = [
        (parent, name, child)
        for parent in list(base.modules())
        for name, child in parent.named_children()
        if isinstance(getattr(child, "base_layer", None), nn.Module)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield base
    finally:
        for parent, name, child in wrapped:
            child.base_layer = getattr(parent, name)
            setattr(parent, name, child)
