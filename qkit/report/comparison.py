"""The four-way comparison of models: float, quantized, trained on the grid, and the trained one deployed on another grid."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import pipeline
from qkit.artifact.config import read_config
from qkit.artifact.metadata import fit_of, fit_text
from qkit.coverage_table import coverage
from qkit.engines.abilities import want_honored
from qkit.engines.protocol import Builds
from qkit.errors import QkitError, RecipeError
from qkit.evaluation import evaluate, open_model
from qkit.planning import plan
from qkit.reference.packing import Packed
from qkit.report.code_changes import CodeChange, compare_codes, packed_weights
from qkit.report.estimates import LONGER, Found, Row, baseline, premium, rows_of
from qkit.report.findings import Comparison
from qkit.report.master_weights import fill_with_values, model_of_checkpoint, recipe_of_layers
from qkit.report.measured import Measurement, Measurements
from qkit.rules import Recipe, rule_table
from qkit.storage.read import read_folder

Progress = Callable[
    [str, int], None
]  #: takes a model's row, and how many windows were measured since; 0 before the first


@dataclass(frozen=True, slots=True)
class Sources:
    """The directories and recipes of a comparison.

    Attributes:
        floats: the float directory.
        recipe: the recipe that quantizes it. None: the rules that the layers of `qat` have.
        deploy: other recipes to put the same weights on.
        ptq: a quantized directory to take instead of converting `floats`.
        qat: the directory that was trained on the grid. None: the comparison has no trained rows.
        master_weights: the trained master weights of `qat`: a float directory or a checkpoint of `qkit train`. None: the
            comparison takes the dequantized values of `qat` instead.
        longer: a float directory that was trained for as many more steps as `qat`: the fair baseline. None: `floats`.
    """

    floats: Path
    recipe: Recipe | None = None
    deploy: tuple[Recipe, ...] = ()
    ptq: Path | None = None
    qat: Path | None = None
    master_weights: Path | None = None
    longer: Path | None = None

    @property
    def models(self) -> int:
        """How many models are measured."""
        untrained = 1 if self.longer is None else 2
        return untrained + (untrained + (self.qat is not None)) * (1 + len(self.deploy))


def compare(
    engine: Builds,
    sources: Sources,
    rows: NDArray[np.int32],
    *,
    progress: Progress,
    measurements: Measurements | None = None,
) -> Comparison:
    """The comparison of `sources` on `rows` [windows, length + 1]. At most the float model and one other are in memory.

    Checks that every recipe fits the float model before the first measurement.

    Args:
        measurements: those of an earlier run, which are taken over, and where each new one is written.

    Raises:
        RecipeError: a layer of `qat` or `ptq` is on another grid than the recipe says, or a recipe does not fit the model.
        QkitError: there are fewer than two windows; or see `open_model`, `convert` and `evaluate`.
    """
    if len(rows) < 2:
        raise QkitError("an interval needs at least 2 windows of text: give more text, or a shorter length")
    return _Work(engine, sources, rows, progress, measurements or Measurements(None, {})).comparison()


class _Work:
    """Opens the models one after another, and stores the measurements and packed weights of each."""

    def __init__(
        self,
        engine: Builds,
        sources: Sources,
        rows: NDArray[np.int32],
        progress: Progress,
        measurements: Measurements,
    ) -> None:
        self.engine, self.sources, self.rows, self.progress = engine, sources, rows, progress
        self.measurements = measurements
        self.found: Found = {}
        self.weights: dict[str, dict[str, Packed]] = {}
        self.teacher = open_model(engine, sources.floats)
        self.recipe = self._recipe()
        self._check_fits()

    def comparison(self) -> Comparison:
        sources, name = self.sources, self.recipe.name
        self._measure("float", "", str(sources.floats), sources.floats, lambda: self.teacher)
        if sources.longer:
            self._measure(LONGER, "", str(sources.longer), sources.longer, partial(self._open, sources.longer))
        self._untrained(name)
        if sources.qat:
            self._trained(name)
        base = baseline(self.found)
        grids = [name, *(recipe.name for recipe in sources.deploy)]
        return Comparison(
            recipe=name,
            recipes=tuple(map(_table, (self.recipe, *sources.deploy))),
            baseline=base,
            rows=tuple(rows_of(self.found, base)),
            premiums=tuple(premium(self.found, grid, home=name, base=base) for grid in grids) if sources.qat else (),
            trained=tuple(compare_codes(self.weights["PTQ"], self.weights["QAT"])) if sources.qat else (),
            deployed={grid: tuple(self._deployed(grid)) for grid in grids[1:]} if sources.qat else {},
            masters=self._masters_name() if sources.qat and (sources.deploy or sources.master_weights) else "",
            masters_equal=self._masters_equal() if sources.qat and sources.master_weights else None,
            tokens=self.rows[:, 1:].size,
            windows=len(self.rows),
            length=self.rows.shape[1] - 1,
        )

    def _recipe(self) -> Recipe:
        """The recipe of `sources`, or else that of the trained model. Checks before any work that the trained model is on it."""
        recipe, qat, ptq = self.sources.recipe, self.sources.qat, self.sources.ptq
        if qat is not None:
            model = open_model(self.engine, qat)
            recipe = recipe or recipe_of_layers(self.engine, model)
            self._check_grids("QAT", model, recipe)
        if recipe is None:
            raise RecipeError("neither a recipe nor a trained model is given: name one of them")
        if ptq is not None:
            self._check_grids("PTQ", open_model(self.engine, ptq), recipe)
        names = [recipe.name, *(other.name for other in self.sources.deploy)]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"two of the recipes are called {name!r}: rename one of the files, or leave it away")
        return recipe

    def _check_fits(self) -> None:
        """Raises RecipeError, before any measurement, if `convert` would refuse one of the recipes; it names all of them."""
        sources = self.sources
        home = sources.ptq is None or sources.longer or (sources.qat and sources.master_weights)
        layers = list(self.engine.layers(self.teacher))
        refused = []
        for recipe in ([self.recipe] if home else []) + list(sources.deploy):
            try:
                for item in plan(layers, recipe):
                    if item.rule and item.rule.range != "dynamic":
                        raise RecipeError(
                            f"{item.layer.path}: range = {item.rule.range!r} takes its scales from training, and a float "
                            "model that is converted has none: name a quantized directory by --ptq"
                        )
                want_honored(self.engine, recipe.rules, "convert")
            except QkitError as error:
                refused.append(f"recipe {recipe.name!r} does not fit {sources.floats}: {error}")
        if refused:
            raise RecipeError("; ".join(refused))

    def _open(self, directory: Path) -> Any:
        return open_model(self.engine, directory)

    def _converted(self, directory: Path, recipe: Recipe) -> Any:
        return pipeline.convert(self._open(directory), recipe, backend=self.engine)

    def _untrained(self, name: str) -> None:
        """Measures the untrained models: `floats`, and `longer` if there is one, quantized on every grid."""
        origins = {"PTQ": self.sources.floats} | ({"longer PTQ": self.sources.longer} if self.sources.longer else {})
        for row, directory in origins.items():
            keep = row == "PTQ" and self.sources.qat is not None
            if row == "PTQ" and self.sources.ptq:
                ptq = self.sources.ptq
                self._measure(row, name, _source(ptq), ptq, partial(self._open, ptq), keep=keep)
            else:
                self._measure_on(row, directory, self.recipe, keep=keep)
            for recipe in self.sources.deploy:
                self._measure_on(f"{row} on {recipe.name}", directory, recipe)

    def _measure_on(self, row: str, directory: Path, recipe: Recipe, *, keep: bool = False) -> None:
        make, source = partial(self._converted, directory, recipe), f"{directory}, quantized"
        self._measure(row, recipe.name, source, directory, make, recipe=recipe, keep=keep)

    def _trained(self, name: str) -> None:
        qat = self.sources.qat
        assert qat is not None
        self._measure("QAT", name, _source(qat), qat, partial(self._open, qat), keep=True)
        masters, origin = self._masters_name(), self.sources.master_weights or qat
        for recipe in self.sources.deploy:
            make = partial(self._deploy, recipe)
            self._measure(f"QAT on {recipe.name}", recipe.name, masters, origin, make, recipe=recipe, keep=True)

    def _deploy(self, recipe: Recipe) -> Any:
        return pipeline.convert(self._open_master_weights(), recipe, backend=self.engine)

    def _open_master_weights(self) -> Any:
        assert self.sources.qat is not None
        masters = self.sources.master_weights
        if masters and masters.is_file():
            return model_of_checkpoint(self.engine, masters, read_config(self.sources.floats))
        if masters:
            return open_model(self.engine, masters)
        model = open_model(self.engine, self.sources.qat)
        return fill_with_values(self.engine, model, into=open_model(self.engine, self.sources.floats))

    def _masters_name(self) -> str:
        masters, qat = self.sources.master_weights, self.sources.qat
        return f"{masters}, the trained master weights" if masters else f"{qat}, its dequantized values"

    def _masters_equal(self) -> tuple[int, int]:
        model = pipeline.convert(self._open_master_weights(), self.recipe, backend=self.engine)
        found = compare_codes(self.weights["QAT"], packed_weights(self.engine, model))
        numbers = sum(change.numbers for change in found)
        return numbers - sum(change.flipped or 0 for change in found), numbers

    def _measure(
        self,
        name: str,
        grid: str,
        source: str,
        origin: Path,
        make: Callable[[], Any],
        *,
        recipe: Recipe | None = None,
        keep: bool = False,
    ) -> None:
        """Measures the model that `make` returns, unless an earlier run has; `keep` stores its packed weights."""
        key = self.measurements.key(origin, recipe)
        one = self.measurements.known(name, key)
        model = make() if one is None or keep else None
        if one is None:
            self.progress(name, 0)
            step = partial(self.progress, name)
            evaluation = evaluate(self.engine, model, self.rows, teacher=self.teacher, tick=step)
            size = coverage(model, backend=self.engine)
            one = Measurement(evaluation, size.bits_per_weight, size.nbytes)
            self.measurements.add(name, key, one)
        else:
            self.progress(name, len(self.rows))
        self.found[name] = Row(grid, source, one)
        if keep:
            self.weights[name] = packed_weights(self.engine, model)

    def _check_grids(self, name: str, model: Any, recipe: Recipe) -> None:
        """Raises RecipeError if a layer of `model` is on another grid than `recipe` says."""
        for layer in self.engine.layers(model):
            if layer.kind == "other" or layer.tied:
                continue
            wanted = recipe.rule_for(layer.name, layer.kind, head=layer.head)
            said, held = (
                tuple(str((rule and getattr(rule, slot)) or "float") for slot in ("weight", "activation", "output"))
                for rule in (wanted, layer.rule)
            )
            if said != held and not (layer.rule is None and wanted and wanted.indivisible == "skip"):
                raise RecipeError(
                    f"{name}: {layer.path} is on {held[0]} with inputs on {held[1]}, and recipe {recipe.name!r} says "
                    f"{said[0]} and {said[1]}: name the recipe it was made with"
                )

    def _deployed(self, grid: str) -> list[CodeChange]:
        return compare_codes(self.weights["QAT"], self.weights[f"QAT on {grid}"])


def _table(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "version": recipe.version, "rules": [rule_table(rule) for rule in recipe.rules]}


def _source(directory: Path) -> str:
    """A directory, and how its codes were chosen where that is not by the rule of their grid."""
    fit = fit_of(read_folder(directory)[1])
    return f"{directory}, {fit_text(fit)}" if fit else str(directory)
