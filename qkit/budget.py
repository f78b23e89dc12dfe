"""`allot`: a grid for each layer, so that the output fits into a number of bytes, with the least harm.

The harm of a grid to a layer is estimated in nats of KL divergence: half the sum of F d^2 over its weights, where d is the
difference of the fitted values and F the diagonal of the Fisher information, with labels that the model itself draws; or it is
measured, with this layer alone on the grid. The errors of layers add up, by assumption. Among all choices, dynamic programming
finds the least sum exactly.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import fused
from qkit.artifact.load import load
from qkit.engines.abilities import require
from qkit.engines.blocks import Scores, Watches
from qkit.engines.protocol import Builds
from qkit.errors import PlanError
from qkit.evaluation import evaluate
from qkit.fitting.choose import Choice, choose
from qkit.fitting.fits import Fit
from qkit.reference.rounding import dequantize
from qkit.rules import Recipe, Rule
from qkit.streaming.plan import Plan, Row, make_plan

PATIENCE = 20  #: corrections of the room for headers, which depend on the choice itself

#: The harm of values to layers, by path, whose float weights come first.
Harm = Callable[[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]], float]


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that an output may take.

    Attributes:
        amount: bits for each quantized weight, scales of 16 bits included, see `Grid.bits_per_weight`; or bytes of all files.
        unit: `bpw` or `bytes`.
    """

    amount: float
    unit: str


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a budget came to.

    Attributes:
        recipe: a rule for each grid, with the paths of its layers.
        plan: of the recipe for the model.
        bits: for each quantized weight.
        harm: the estimate for the whole model, in nats for each token.
    """

    recipe: Recipe
    plan: Plan
    bits: float
    harm: float


def allot(
    folder: Path,
    recipes: Sequence[Recipe],
    budget: Budget,
    rows: NDArray[np.int32],
    *,
    engine: Builds,
    fit: Fit,
    exact: bool = False,
    seed: int = 0,
) -> Allotment:
    """The recipe that gives each layer of the float model in `folder` the grid of one of `recipes`, within `budget`.

    Layers that servers fuse, such as queries, keys and values, share a grid.

    Args:
        recipes: two or more that quantize the same layers, each all of them alike.
        rows: windows of tokens [windows, length].
        fit: how codes will be chosen; the harm is that of fitted values.
        exact: measure the divergence with each grid in turn, instead of estimating it by the Fisher information.
        seed: of the labels that the model draws.

    Raises:
        PlanError: the budget is below the least possible; or the recipes do not go together.
        ArtifactError, BackendError: the model does not open, or the engine cannot score it.
    """
    plans = [make_plan(folder, one) for one in recipes]
    rules = _rules(plans, recipes)
    units = _units(rules[0])
    for mine in rules:
        fit.check(mine)
    engine = require(engine, Watches)
    model = load(folder, backend=engine)
    weights = {layer.name: engine.weight(layer.module) for layer in engine.layers(model) if layer.name in rules[0]}
    harm = _measured(engine, folder, model, rows) if exact else _estimated(engine, model, weights, rows, seed)
    choices: list[list[Choice]] = []
    for unit in units:
        floats = {path: engine.to_numpy(weights[path]) for path in unit}
        choices.append(
            [
                Choice(number, _nbytes(made, unit, budget), harm(floats, _fitted(floats, mine, fit)))
                for number, (made, mine) in enumerate(zip(plans, rules, strict=True))
            ]
        )
    return _within(folder, recipes, units, choices, rules, plans, budget)


def _within(
    folder: Path,
    recipes: Sequence[Recipe],
    units: Sequence[tuple[str, ...]],
    choices: Sequence[Sequence[Choice]],
    rules: Sequence[Mapping[str, Rule]],
    plans: Sequence[Plan],
    budget: Budget,
) -> Allotment:
    """The best choice whose output, counted with its headers, is within the budget."""
    weights = sum(prod(row.shape) for row in plans[0].rows if row.rule)
    if budget.unit == "bpw":
        capacity = int(budget.amount * weights / 8)
        least = sum(min(one.nbytes for one in mine) for mine in choices)
        if least > capacity:
            raise PlanError(
                f"a budget of {budget.amount:g} bits per weight is below the least possible, which is "
                f"{8 * least / weights:.4f} with these grids: raise it, or add a smaller grid"
            )
        return _made(folder, recipes, units, choose(choices, capacity), rules, plans)
    smallest = _made(folder, recipes, units, [min(c, key=lambda one: one.nbytes) for c in choices], rules, plans)
    floor, amount = smallest.plan.output_bytes, int(budget.amount)
    if floor > amount:
        raise PlanError(
            f"a budget of {amount:,} bytes is below the least possible, which is {floor:,} with these grids: raise it, or "
            "add a smaller grid"
        )
    capacity = amount - floor + sum(min(one.nbytes for one in mine) for mine in choices)
    for _ in range(PATIENCE):  # other choices have headers of other lengths
        made = _made(folder, recipes, units, choose(choices, capacity), rules, plans)
        over = made.plan.output_bytes - amount
        if over <= 0:
            return made
        capacity -= over
        if capacity < sum(min(one.nbytes for one in mine) for mine in choices):
            break
    return smallest


def _made(
    folder: Path,
    recipes: Sequence[Recipe],
    units: Sequence[tuple[str, ...]],
    found: Sequence[Choice],
    rules: Sequence[Mapping[str, Rule]],
    plans: Sequence[Plan],
) -> Allotment:
    grids = {path: one.grid for unit, one in zip(units, found, strict=True) for path in unit}
    paths: dict[Rule, list[str]] = {}
    for path, number in grids.items():
        given = rules[number][path]
        rule = Rule(("*",), kind=given.kind, weight=given.weight, activation=given.activation)
        paths.setdefault(rule, []).append(path)
    chosen = [row for number, made in enumerate(plans) for row in made.rows if row.rule and grids[row.path] == number]
    bits = sum(map(_bits, chosen)) / sum(prod(row.shape) for row in chosen)
    recipe = Recipe(
        name="budget",
        rules=tuple(replace(rule, match=tuple(mine)) for rule, mine in paths.items()),
        summary=f"{bits:.4f} bits per quantized weight, allotted among {', '.join(one.name for one in recipes)}",
    )
    return Allotment(recipe, make_plan(folder, recipe), bits, sum(one.harm for one in found))


def _rules(plans: Sequence[Plan], recipes: Sequence[Recipe]) -> list[dict[str, Rule]]:
    """The rule of each layer under each recipe.

    Raises:
        PlanError: there is one recipe only; or they quantize other layers, or experts.
    """
    if len(plans) < 2:
        raise PlanError("a budget is allotted among two or more grids, such as int2-g32,int3-g32,int4-g32")
    found = [{row.path: row.rule for row in made.rows if row.rule} for made in plans]
    experts = next((row.path for row in plans[0].rows if row.rule and row.kind == "experts"), None)
    if experts:
        raise PlanError(
            f"{experts}: nothing estimates the harm to experts, so that a budget cannot allot them a grid: use recipes without a "
            "rule for experts"
        )
    for mine, recipe in zip(found, recipes, strict=True):
        if other := sorted(mine.keys() ^ found[0].keys()):
            raise PlanError(
                f"{recipe.name} and {recipes[0].name} quantize other layers, such as {other[0]}: give alike ones"
            )
    return found


def _units(rules: Mapping[str, Rule]) -> list[tuple[str, ...]]:
    """The layers, those that servers fuse together, in their order."""
    together = {path: group for group in fused.groups(rules) for path in group}
    return list(dict.fromkeys(together.get(path, (path,)) for path in rules))


def _nbytes(made: Plan, unit: Iterable[str], budget: Budget) -> int:
    """Bytes of some layers: of their tensors in the output, or for a budget of bits by their grids."""
    rows = [row for row in made.rows if row.path in unit and row.rule]
    if budget.unit == "bytes":
        return sum(slot.nbytes for row in rows for slot in row.slots)
    return sum(round(_bits(row)) for row in rows) // 8


def _bits(row: Row) -> float:
    assert row.rule is not None
    assert row.rule.weight is not None
    return row.rule.weight.bits_per_weight(row.shape) * prod(row.shape)


def _fitted(floats: Mapping[str, NDArray[Any]], rules: Mapping[str, Rule], fit: Fit) -> dict[str, NDArray[Any]]:
    """The values of layers that share a grid."""
    grids = {path: grid for path in floats if (grid := rules[path].weight)}
    peak = max(float(np.abs(w).max()) for w in floats.values())
    peaks = {path: peak if fused.shares(grids[path]) else None for path in floats}
    return {path: dequantize(fit.quantize(w, grids[path], path=path, peak=peaks[path])) for path, w in floats.items()}


def _estimated(engine: Any, model: Any, weights: Mapping[str, Any], rows: NDArray[np.int32], seed: int) -> Harm:
    found = require(engine, Scores).squared_gradients(model, rows, list(weights), seed=seed)

    def harm(floats: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]]) -> float:
        return sum(
            0.5
            * float(np.sum(found[path] * np.square(values[path].astype(np.float64) - floats[path].astype(np.float64))))
            for path in floats
        )

    return harm


def _measured(engine: Watches, folder: Path, model: Any, rows: NDArray[np.int32]) -> Harm:
    teacher, blocks = load(folder, backend=engine), engine.blocks(model, length=rows.shape[1])

    def harm(floats: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]]) -> float:
        for path, one in values.items():
            blocks.put(path, one.astype(np.float32))
        found = evaluate(engine, model, rows, teacher=teacher).kl
        for path, w in floats.items():
            blocks.put(path, w.astype(np.float32))
        assert found is not None
        return float(found.mean())

    return harm
