"""The four-way comparison of models: float, quantized, trained on the grid, and the trained one deployed on another grid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import pipeline
from qkit.artifact.config import read_config
from qkit.engines.protocol import Builds
from qkit.errors import RecipeError
from qkit.evaluation import Evaluation, evaluate, open_model
from qkit.reference.packing import Packed
from qkit.report.code_changes import CodeChange, compare_codes, packed_weights
from qkit.report.findings import Comparison, Measured, Premium
from qkit.report.intervals import mean, recovered
from qkit.report.master_weights import fill_with_values, model_of_checkpoint, recipe_of_layers
from qkit.rules import Recipe, rule_table

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


def compare(engine: Builds, sources: Sources, rows: NDArray[np.int32], *, progress: Progress) -> Comparison:
    """The comparison of `sources` on `rows` [windows, length + 1]. At most the float model and one other are in memory.

    Raises:
        RecipeError: a layer of `qat` or `ptq` is on another grid than the recipe says.
        QkitError: there are fewer than two windows; or see `open_model`, `convert` and `evaluate`.
    """
    return _Work(engine, sources, rows, progress).comparison()


class _Work:
    """Opens the models one after another, and stores the losses and packed weights of each."""

    def __init__(self, engine: Builds, sources: Sources, rows: NDArray[np.int32], progress: Progress) -> None:
        self.engine, self.sources, self.rows, self.progress = engine, sources, rows, progress
        self.found: dict[str, tuple[str, str, Evaluation]] = {}  # by the row's name: grid, source, measurement
        self.weights: dict[str, dict[str, Packed]] = {}
        self.teacher = open_model(engine, sources.floats)
        self.recipe = self._recipe()

    def comparison(self) -> Comparison:
        sources, name = self.sources, self.recipe.name
        base = "float, longer" if sources.longer else "float"
        self._measure("float", "", str(sources.floats), self.teacher)
        if sources.longer:
            self._measure(base, "", str(sources.longer), open_model(self.engine, sources.longer))
        self._untrained(name)
        if sources.qat:
            self._trained(name)
        grids = [name, *(recipe.name for recipe in sources.deploy)]
        return Comparison(
            recipe=name,
            recipes=tuple(map(_table, (self.recipe, *sources.deploy))),
            baseline=base,
            rows=tuple(self._rows(base)),
            premiums=tuple(self._premium(grid, base) for grid in grids) if sources.qat else (),
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
        recipe, qat = self.sources.recipe, self.sources.qat
        if qat is not None:
            model = open_model(self.engine, qat)
            recipe = recipe or recipe_of_layers(self.engine, model)
            self._check_grids("QAT", model, recipe)
        if recipe is None:
            raise RecipeError("neither a recipe nor a trained model is given: name one of them")
        names = [recipe.name, *(other.name for other in self.sources.deploy)]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"two of the recipes are called {name!r}: rename one of the files, or leave it away")
        return recipe

    def _untrained(self, name: str) -> None:
        """Measures the untrained models: `floats`, and `longer` if there is one, quantized on every grid."""
        origins = {"PTQ": self.sources.floats} | ({"longer PTQ": self.sources.longer} if self.sources.longer else {})
        for row, directory in origins.items():
            if row == "PTQ" and self.sources.ptq:
                model, source = open_model(self.engine, self.sources.ptq), str(self.sources.ptq)
            else:
                model = pipeline.convert(open_model(self.engine, directory), self.recipe, backend=self.engine)
                source = f"{directory}, quantized"
            self._check_grids(row, model, self.recipe)
            self._measure(row, name, source, model, keep=True)
            for recipe in self.sources.deploy:
                other = pipeline.convert(open_model(self.engine, directory), recipe, backend=self.engine)
                self._measure(f"{row} on {recipe.name}", recipe.name, f"{directory}, quantized", other)

    def _trained(self, name: str) -> None:
        assert self.sources.qat is not None
        self._measure("QAT", name, str(self.sources.qat), open_model(self.engine, self.sources.qat), keep=True)
        for recipe in self.sources.deploy:
            deployed = pipeline.convert(self._open_master_weights(), recipe, backend=self.engine)
            self._measure(f"QAT on {recipe.name}", recipe.name, self._masters_name(), deployed, keep=True)

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

    def _measure(self, name: str, grid: str, source: str, model: Any, *, keep: bool = False) -> None:
        self.progress(name, 0)
        step = partial(self.progress, name)
        self.found[name] = (grid, source, evaluate(self.engine, model, self.rows, teacher=self.teacher, tick=step))
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

    def _rows(self, base: str) -> Iterator[Measured]:
        zero = self.found[base][2].losses
        for name, (grid, source, one) in self.found.items():
            assert one.kl is not None
            assert one.agreement is not None
            yield Measured(
                name,
                grid,
                source,
                mean(one.losses),
                mean(one.losses - zero),
                one.perplexity,
                float(one.kl.mean()),
                float(one.agreement.mean()),
            )

    def _premium(self, grid: str, base: str) -> Premium:
        trained = "" if grid == self.recipe.name else f" on {grid}"
        untrained = ("longer PTQ" if self.sources.longer else "PTQ") + trained
        floats, ptq, qat, home = (self.found[name][2].losses for name in (base, untrained, f"QAT{trained}", "QAT"))
        moved = mean(qat - home) if trained else None
        return Premium(grid, mean(ptq - qat), moved, recovered(floats, ptq, qat))

    def _deployed(self, grid: str) -> list[CodeChange]:
        return compare_codes(self.weights["QAT"], self.weights[f"QAT on {grid}"])


def _table(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "version": recipe.version, "rules": [rule_table(rule) for rule in recipe.rules]}
