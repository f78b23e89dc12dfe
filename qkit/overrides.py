"""Changes to a recipe for one run, as the options `--ignore` and `--skip-indivisible` ask for them."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

from qkit.errors import RecipeError
from qkit.rules import Kind, Recipe, Rule


def overridden(
    recipe: Recipe, *, ignore: Sequence[str] = (), skip_indivisible: bool = False, freeze_codes: bool = False
) -> Recipe:
    """`recipe`, whose layers that match a pattern of `ignore` stay in float.

    Args:
        ignore: shell patterns for the paths of layers.
        skip_indivisible: whether layers that do not divide into groups stay in float, too.
        freeze_codes: whether scales train alone.

    Raises:
        RecipeError: a pattern is empty; or scales of a grid cannot train alone.
    """
    rules = recipe.rules
    if skip_indivisible:
        rules = tuple(replace(rule, indivisible="skip") for rule in rules)
    if freeze_codes:
        rules = tuple(replace(rule, scales="alone") if rule.weight else rule for rule in rules)
    if ignore:
        rules = (*(Rule(tuple(ignore), kind=kind) for kind in get_args(Kind)), *rules)
    return replace(recipe, rules=rules)


def without_ignored(recipe: Recipe) -> Recipe:
    """`recipe` without the rules of `ignore` in `overridden`, which are its first: one for each kind of layer, same patterns."""
    front = recipe.rules[: len(get_args(Kind))]
    added = tuple(Rule(front[0].match, kind=kind) for kind in get_args(Kind))
    return replace(recipe, rules=recipe.rules[len(front) :]) if front == added else recipe


def check_ignored(ignore: Sequence[str], paths: Collection[str]) -> None:
    """Checks that each pattern of `ignore` matches one of `paths`, those of all layers of a model.

    Raises:
        RecipeError: a pattern matches none.
    """
    for pattern in ignore:
        if not any(fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(list(dict.fromkeys(paths))[:4])
            raise RecipeError(f"--ignore {pattern!r} matches no layer of this model, which has {some}, ...")
