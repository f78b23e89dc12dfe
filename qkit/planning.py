"""plan: a recipe over the layers of a model, as a rule or a reason for each; nothing is touched."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from qkit.engines.layer import Layer
from qkit.errors import CoverageWarning, RecipeError
from qkit.grid import want_chosen
from qkit.misfits import want_whole_groups, widths
from qkit.overrides import without_ignored
from qkit.parts import is_in
from qkit.rules import Recipe, Rule

NO_RULE = "no rule matches"  #: a reason
LEFT = "left alone by the rule for"  #: the beginning of a reason
TOWERS = "of a vision or audio tower, which the recipe leaves in float"


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan for one layer: its rule, or None and the reason."""

    layer: Layer
    rule: Rule | None
    reason: str = ""


def plan(layers: Iterable[Layer], recipe: Recipe) -> list[Planned]:
    """The plan of `recipe` for each of `layers`.

    Raises:
        RecipeError: a rule that quantizes matches no layer, or matches one that cannot be quantized.
        GridError: layers do not divide into groups and their rules do not say "skip"; the message lists them all.
    """
    planned = [_plan_layer(layer, recipe) for layer in layers]
    want_whole_groups([width for item in planned if item.rule for width in widths(item.layer, item.rule)])
    owners = {item.layer.path: item for item in reversed(planned)}  # the first of a path
    planned = [_plan_tied(item, owners) if item.layer.tied else item for item in planned]
    asked = without_ignored(recipe)  # a rule whose layers `--ignore` leaves out fits the model
    known = [item.layer for item in planned if item.layer.kind != "other"]
    spoken = {id(_rule_for(layer, asked)) for layer in known}
    meant = [layer for layer in known if (rule := _rule_for(layer, asked)) and rule.weight]
    ignoring = recipe.rules[: len(recipe.rules) - len(asked.rules)]
    if ignoring and all(_rule_for(layer, recipe) in ignoring for layer in meant):
        raise RecipeError(f"{', '.join(recipe.rules[0].match)} leaves no layer on a grid: ignore fewer layers")
    mixed = any(item.layer.kind == "experts" for item in planned)
    wanted = [rule for rule in recipe.rules if rule.weight and (mixed or rule.kind != "experts")]
    for rule in (
        wanted or recipe.rules
    ):  # without rules for experts, so that one recipe serves dense models and mixtures
        if rule.weight and id(rule) not in spoken:
            raise RecipeError(
                f"recipe {recipe.name!r}: the rule for {rule.kind} {', '.join(rule.match)} is first for no layer of this "
                f"model, which has {_paths(planned)}{_others(planned)}: mend its "
                "pattern, or put it before the rule that takes them"
            )
    return planned


def warn_of_rest(planned: Iterable[Planned], recipe: Recipe) -> None:
    """Warns where `recipe` quantizes less than half of the weights that it does not choose to leave out: by name and share.

    It chooses by a rule without a weight grid, and by patterns that are too narrow for a linear layer.
    """
    own = [item for item in planned if not item.layer.tied]
    total, done = (sum(prod(item.layer.shape) for item in some) for some in (own, (one for one in own if one.rule)))
    left: dict[tuple[str, str], int] = defaultdict(int)
    for item in own:
        narrow = item.layer.kind == "linear" and item.reason == NO_RULE
        if not (item.rule or narrow or LEFT in item.reason or item.reason == TOWERS):
            left[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", item.layer.name), item.reason] += prod(item.layer.shape)
    if done >= sum(left.values()):
        return
    largest = sorted(left.items(), key=lambda one: -one[1])[:3]
    named = ", ".join(f"{name} ({size / total:.1%} of them: {reason})" for (name, reason), size in largest)
    warnings.warn(
        f"recipe {recipe.name!r} quantizes {done / total:.1%} of the weights, and leaves in float {named}: take a recipe with "
        "rules for them, or name them in a rule without weight",
        CoverageWarning,
        stacklevel=4,
    )


def _plan_layer(layer: Layer, recipe: Recipe) -> Planned:
    if layer.kind == "other":
        return Planned(layer, None, layer.obstacle)
    rule = _rule_for(layer, recipe)
    if rule is None:
        return Planned(layer, None, NO_RULE if is_in(layer.name, "language") else TOWERS)
    if rule.weight is None:
        return Planned(layer, None, f"{LEFT} {', '.join(rule.match)}")
    want_chosen(rule.weight)
    if layer.obstacle:
        if rule.indivisible == "skip":
            return Planned(layer, None, layer.obstacle)
        raise RecipeError(
            f"{layer.path}: {layer.obstacle}; put a rule without weight before, that matches it, to leave it alone"
        )
    if rule.indivisible == "skip" and (misfit := next((one for one in widths(layer, rule) if not one.fits), None)):
        return Planned(layer, None, f"skipped: {misfit}")
    return Planned(layer, rule)


def _rule_for(layer: Layer, recipe: Recipe) -> Rule | None:
    assert layer.kind != "other"
    return recipe.rule_for(layer.name, layer.kind, head=layer.head)


def _plan_tied(item: Planned, owners: Mapping[str, Planned]) -> Planned:
    """The plan for a layer whose weight belongs to a layer before it: both are quantized as one, or it is refused."""
    layer = item.layer
    owner = owners.get(layer.tied)
    if owner is None:
        return item
    if item.rule and item.rule.scales != "rule":
        raise RecipeError(
            f"{layer.path}: its weight is tied to that of {layer.tied}, and two layers cannot learn one weight's scales: use "
            'scales = "rule", or untie them'
        )
    mine, theirs = (one.rule.weight if one.rule else None for one in (item, owner))
    if mine == theirs and not (item.rule and item.rule.slots):
        return item
    obstacle = f"its weight is tied to that of {layer.tied}"
    if item.rule and item.rule.slots and mine == theirs:
        raise RecipeError(f"{layer.path}: {obstacle}, so that it takes no activation or output grid: drop it")
    if layer.kind == "other":
        raise RecipeError(
            f"{layer.path}: {obstacle}, which the recipe puts on {theirs}, and {layer.obstacle}; leave {layer.tied} alone with a "
            "rule without weight"
        )
    if theirs is None and item.rule and item.rule.indivisible == "skip":
        return Planned(layer, None, f"skipped: {obstacle}, which is left alone")
    raise RecipeError(
        f"{layer.path}: {obstacle}, and one weight is on one grid: the recipe puts {layer.tied} on {theirs or 'none'} and "
        f"{layer.path} on {mine or 'none'}; give both the same weight grid (one rule of kind embedding, one of kind linear), "
        "or leave both alone"
    )


def _others(planned: list[Planned]) -> str:
    """The largest weight that no rule can match, and the reason."""
    others = [item.layer for item in planned if item.layer.kind == "other" and len(item.layer.shape) > 1]
    if not others:
        return ""
    largest = max(others, key=lambda layer: prod(layer.shape))
    return f"; no rule can match {largest.path}: {largest.obstacle}"


def _paths(planned: list[Planned]) -> str:
    known = [item.layer for item in planned if item.layer.kind != "other"]
    paths = [f"{layer.kind} {layer.path or '(the model itself)'}" for layer in known]
    return (
        ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
        if paths
        else "no linear or embedding layers and no experts"
    )
