"""A callback for transformers' Trainer and trainers built on it, as TRL's are: prepares the model, and follows a schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

import qkit
from qkit.code_changes import code_sums, sum_of_codes, warn_of_no_change
from qkit.coverage_table import Coverage
from qkit.engines.abilities import require
from qkit.engines.layer import Layer, want_known
from qkit.engines.protocol import Trains
from qkit.errors import StageError
from qkit.pipeline import surgeon, want_mergeable
from qkit.planning import plan
from qkit.reference.learned import is_learned, is_offset
from qkit.rules import Recipe, Rule
from qkit.training.schedule import Schedule, switching
from qkit_torchao.models.fused_head import watch_head

log = logging.get_logger(__name__)


class QatCallback(TrainerCallback):
    """Prepares the trainer's model, so that it trains on the grids of `recipe`.

    As `Trainer(..., callbacks=[QatCallback("int4-g64")])`, it prepares before the trainer shards, wraps or compiles the
    model; added later, or with `model_init`, when training begins. One callback may serve several trainers. A model that is
    prepared already must be on the same grids. Checkpoints have the names of the float model. Where peft has put adapters, the
    base is prepared, under the paths it had without them, and adapters stay float.

    Evaluation is on the grids of `recipe`, whatever the schedule says, so that the best checkpoint is the best model to ship.
    After training the model is still prepared: `qkit.save(qkit.convert(trainer.model), "out")`. With adapters of peft's, call
    `qkit.merge` before `qkit.convert`; if the model is sharded, convert and save the result of `qkit.gather`. Warns if no code
    has changed.

    Raises:
        StageError: the model is on other grids, or the trainer's optimizer would not train learned scales as they need it.
        RecipeError, GridError: the recipe does not fit.
        RunError: the schedule makes no sense, or does not fit the model.

    Attributes:
        coverage: the `qkit.coverage` of the model that was prepared last; None before.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        *,
        start: int = 0,
        interval: int = 1,
        windows: Sequence[tuple[int, int]] = (),
        ramp: Sequence[tuple[int, str]] = (),
        match: str = "*",
    ) -> None:
        """The schedule counts steps of the optimizer, from the beginning of training.

        Args:
            start: how many steps compute in float before the first that quantizes.
            interval, windows, ramp, match: as in `qkit.training.schedule.Schedule`, where steps count from 1.
        """
        self.recipe = recipe
        self.schedule = Schedule(start + 1, tuple(map(tuple, windows)), match, interval, tuple(map(tuple, ramp)))  # type: ignore[arg-type]
        self.coverage: Coverage | None = None
        self._own: WeakSet[nn.Module] = WeakSet()
        self._before: Callable[[int], None] = lambda step: None
        self._left: list[tuple[Layer, Rule]] = []
        self._sums: dict[str, int] = {}

    def on_init_end(self, *_: Any, model: Any = None, **more: Any) -> None:
        """Prepares before the trainer builds its optimizer."""
        if model is not None:
            self._prepare(model)

    def on_train_begin(
        self, args: Any, state: Any, *_: Any, model: Any = None, optimizer: Any = None, **more: Any
    ) -> None:
        """Prepares a model that came late, and checks the optimizer."""
        self._prepare(model)
        _check_optimizer(model, optimizer)
        if state.global_step % self.schedule.interval:
            raise StageError(
                f"interval is {self.schedule.interval}, and training goes on after step {state.global_step}, between two "
                "refreshes: save checkpoints at multiples of the interval"
            )
        engine, self._left = _engine(model), []
        self._before = switching(engine, model, self.schedule)
        self._rules = {layer.path: layer.rule for layer in engine.layers(model)}
        self._sums = _sums(engine, model)

    def on_step_begin(self, args: Any, state: Any, *_: Any, model: Any = None, **more: Any) -> None:
        """Puts the layers on the grids of the next step."""
        engine = _engine(model)
        for layer, rule in self._left:
            if layer.rule != rule:
                engine.regrid(layer.module, rule)
            engine.switch_mode(layer.module, layer.mode)
        self._left = []
        self._before(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **more: Any) -> None:
        """Puts the layers on the grids of the recipe, for an evaluation."""
        self._leave(model, evaluates=control.should_evaluate)

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **more: Any) -> None:
        """As `on_step_end`."""
        self._leave(model, evaluates=control.should_evaluate)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **more: Any) -> None:
        """Leaves the layers on the grids of the recipe, and warns if no code has changed."""
        self._leave(model, evaluates=True)
        self._left = []
        if self._sums:
            warn_of_no_change(self._sums, _sums(_engine(model), model), rate=args.learning_rate, stacklevel=2)

    def _prepare(self, model: nn.Module) -> None:
        engine = _engine(model)
        layers = list(engine.layers(model))
        want_known(layers, "train")
        want_mergeable(engine, model, layers, "train")
        if any(layer.stage == "prepared" for layer in layers):
            if model not in self._own:
                self._check_grids(layers)
        elif qkit.prepare(model, self.recipe, backend=engine) is not model:
            raise StageError("a model that is itself one layer is replaced: prepare it before its trainer is made")
        self._own.add(model)
        watch_head(model)
        self.coverage = qkit.coverage(model)
        count = sum(layer.stage == "prepared" for layer in engine.layers(model))
        if not count:
            raise StageError(
                f"recipe {qkit.recipe(self.recipe).name!r} quantizes no layer of this model: choose another"
            )
        log.info("%d layers train on their grids: %.2f bits per weight", count, self.coverage.bits_per_weight)

    def _check_grids(self, layers: list[Layer]) -> None:
        """Refuses a prepared model whose layers are not on the grids of the recipe."""
        recipe = qkit.recipe(self.recipe)
        for item in plan(layers, recipe):
            wanted, has = (
                None if rule is None else replace(rule, match=("*",)) for rule in (item.rule, item.layer.rule)
            )
            if wanted != has:
                grids = [str(rule.weight) if rule else "float" for rule in (has, wanted)]
                raise StageError(
                    f"{item.layer.path} is prepared on {grids[0]}, and recipe {recipe.name!r} of the callback says {grids[1]}: "
                    "leave preparing to the callback, give it the same recipe, or call qkit.regrid(model, recipe) before"
                )

    def _leave(self, model: nn.Module, *, evaluates: bool) -> None:
        """Puts the layers that the schedule has put elsewhere on the grids of the recipe, until the next step."""
        engine = _engine(model)
        for layer in engine.layers(model) if self.schedule != Schedule() else ():
            rule = self._rules.get(layer.path)
            if layer.stage != "prepared" or rule is None or layer.rule is None:
                continue
            ramped = evaluates and layer.rule != rule
            if layer.mode != "on" or ramped:
                self._left.append((replace(layer, rule=rule if ramped else layer.rule), layer.rule))
                if ramped:
                    engine.regrid(layer.module, rule)
                engine.switch_mode(layer.module, "on")


def _engine(model: nn.Module) -> Trains:
    return require(surgeon(model, None), Trains)


def _trains_weights(engine: Trains, model: nn.Module) -> bool:
    """Whether the weights of prepared layers train, and not adapters beside them alone."""
    prepared = [layer.module for layer in engine.layers(model) if layer.stage == "prepared"]
    return any(one.requires_grad for module in prepared for one in module.parameters(recurse=False))


def _sums(engine: Trains, model: nn.Module) -> dict[str, int]:
    """Checksums of the codes that would ship; where only LoRA of peft's trains, of the layers that it is merged into."""
    if _trains_weights(engine, model):
        return code_sums(model, backend=engine)
    layers = {
        id(layer.module): layer for layer in engine.layers(model) if layer.stage == "prepared" and not layer.sharded
    }
    found = {}
    for wrapper in model.modules():
        layer, factors = layers.get(id(getattr(wrapper, "base_layer", None))), getattr(wrapper, "lora_A", None)
        if layer is None or not factors or any(getattr(wrapper, "use_dora", {}).values()):
            continue
        merge: Any = wrapper
        w = engine.weight(layer.module).detach()
        for name in merge.active_adapters:
            if name in factors:
                w = w + merge.get_delta_weight(name).detach().to(w)
        found[layer.path] = sum_of_codes(engine, w, layer.rule)
    return found


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuses an optimizer that leaves learned scales out, decays them, or moves offsets at the rate of weights."""
    learned = {id(one): name for name, one in model.named_parameters() if one.requires_grad and is_learned(name)}
    if not learned:
        return
    seen: set[int] = set()
    for group in optimizer.param_groups:
        ids = {id(one) for one in group["params"]}
        seen |= ids
        names = [learned[key] for key in ids & learned.keys()]
        alone = all(is_offset(learned.get(key, "")) for key in ids)
        if any(names) and (group.get("weight_decay") or (any(map(is_offset, names)) and not alone)):
            _refuse_optimizer(names[0], "decays it, or moves it at the rate of weights")
    for key in learned.keys() - seen:
        _refuse_optimizer(learned[key], "leaves it out")


def _refuse_optimizer(name: str, what: str) -> None:
    raise StageError(
        f"{name} is a learned scale, and the trainer's optimizer {what}: prepare the model first, and give the trainer "
        "optimizers=(qkit.adamw(model, lr=1e-5), None)"
    )
