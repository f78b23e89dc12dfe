"""What happens to a model: a named, versioned list of rules, read from flat TOML. First match wins."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast

from qkit.errors import GridError, RecipeError
from qkit.grid import Grid

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

Kind = Literal["linear", "embedding"]
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to layers whose path matches.

    Attributes:
        match: shell patterns (`*`, `?`, `[...]`) for the dotted path of a layer; one that matches is enough.
        kind: `linear` or `embedding`.
        weight: the weight's grid, or None to leave the layer alone.
        activation: the input's grid, quantized at every call in training and after conversion; or None.
        indivisible: what to do where the weight does not divide into groups: `error`, or `skip` the layer.
    """

    match: tuple[str, ...]
    kind: Kind = "linear"
    weight: Grid | None = None
    activation: Grid | None = None
    indivisible: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not self.match or not all(isinstance(pattern, str) and pattern for pattern in self.match):
            raise RecipeError(f"match is {self.match!r}: give at least one pattern, such as '*'")
        if self.kind not in ("linear", "embedding"):
            raise RecipeError(f"kind is {self.kind!r}: choose linear or embedding")
        if self.indivisible not in ("error", "skip"):
            raise RecipeError(f"indivisible is {self.indivisible!r}: choose error or skip")
        if self.activation and not self.weight:
            raise RecipeError("a rule with an activation grid needs a weight grid")
        if self.activation and self.kind == "embedding":
            raise RecipeError("an embedding's input is a token number: drop the activation grid")

    def matches(self, path: str, kind: Kind) -> bool:
        """Whether the rule speaks of the layer at `path`."""
        return kind == self.kind and any(fnmatchcase(path, pattern) for pattern in self.match)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules for a whole model. The version changes when any number it produces does."""

    name: str
    rules: tuple[Rule, ...]
    version: int = 1
    summary: str = ""

    def __post_init__(self) -> None:
        if self.version < 1:
            raise RecipeError(f"version is {self.version}: versions count from 1")
        if not any(rule.weight for rule in self.rules):
            raise RecipeError(f"recipe {self.name!r} has no rule with a weight grid: nothing would be quantized")

    def rule_for(self, path: str, kind: Kind) -> Rule | None:
        """The first rule that matches, if any."""
        return next((rule for rule in self.rules if rule.matches(path, kind)), None)


def read_recipe(file: "Path | Traversable") -> Recipe:
    """The recipe in a TOML file; its name is the file's.

    Raises:
        RecipeError: the file is missing or malformed; the message names the file and the key.
    """
    import tomllib  # here, so that `import qkit` stays cheap

    name = file.name.removesuffix(".toml")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{file}: {error}") from None
    try:
        return recipe_from_table(table, name=name)
    except (RecipeError, GridError) as error:
        raise RecipeError(f"{file}: {error}") from None


def recipe_from_table(table: Mapping[str, Any], *, name: str) -> Recipe:
    """The recipe that a parsed TOML table describes.

    Raises:
        RecipeError: a key is unknown, missing or of the wrong type.
        GridError: a grid does not exist.

    Messages begin with the place, `grids.w` or `rules[2]`, counted from 1.
    """
    _only(table, ("schema", "version", "summary", "grids", "rules"), "the recipe")
    schema = table.get("schema")
    if type(schema) is not int or schema != SCHEMA:  # `true == 1`
        raise RecipeError(f"schema is {schema!r}: this version of qkit reads schema = {SCHEMA}")
    grids, rules = {}, []
    for key, value in _get(table, "grids", dict, {}).items():
        with _place(f"grids.{key}"):
            grids[key] = grid_from_table(value)
    for number, value in enumerate(_get(table, "rules", list, []), start=1):
        with _place(f"rules[{number}]"):
            rules.append(_rule(value, grids))
    summary, version = _get(table, "summary", str, ""), _get(table, "version", int, 1)
    used = {rule.weight for rule in rules} | {rule.activation for rule in rules}
    for key, grid in grids.items():
        if grid not in used:
            raise RecipeError(f"grids.{key}: not used by any rule")
    return Recipe(name=name, rules=tuple(rules), version=version, summary=summary)


def grid_from_table(table: Any) -> Grid:
    """The grid that `{element, group, scale}` describes; `scale` may be left out."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{table!r} is no grid: want a table with element and group")
    _only(table, ("element", "group", "scale"), "a grid")
    for want in ("element", "group"):
        if want not in table:
            raise RecipeError(f"{want} is missing")
    scale = _get(table, "scale", str, "") if "scale" in table else None
    return Grid(_get(table, "element", str, ""), table["group"], scale)


def grid_table(grid: Grid) -> dict[str, Any]:
    """The inverse of `grid_from_table`, complete."""
    return {"element": grid.element.name, "group": grid.group, "scale": grid.scale}


def rule_table(rule: Rule) -> dict[str, Any]:
    """A rule with its grids written out, for files."""
    table: dict[str, Any] = {"match": list(rule.match), "kind": rule.kind}
    if rule.indivisible != "error":
        table["indivisible"] = rule.indivisible
    if rule.weight:
        table["weight"] = grid_table(rule.weight)
    if rule.activation:
        table["activation"] = grid_table(rule.activation)
    return table


def rule_from_table(table: Mapping[str, Any]) -> Rule:
    """The inverse of `rule_table`."""
    grids = {}
    for slot in ("weight", "activation"):
        if slot in table:
            with _place(slot):
                grids[slot] = grid_from_table(table[slot])
    named = {slot: slot for slot in grids}
    return _rule({**{key: value for key, value in table.items() if key not in grids}, **named}, grids)


def _rule(table: Any, grids: Mapping[str, Grid]) -> Rule:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{table!r} is no rule: write [[rules]]")
    _only(table, ("match", "kind", "weight", "activation", "indivisible"), "a rule")
    match = table.get("match", ())
    if not isinstance(match, (str, list, tuple)):
        raise RecipeError(f"match is {match!r}: give a pattern or a list of them")
    patterns = (match,) if isinstance(match, str) else tuple(match)
    return Rule(
        match=patterns,
        kind=cast(Kind, _get(table, "kind", str, "linear")),
        weight=_grid(table, "weight", grids),
        activation=_grid(table, "activation", grids),
        indivisible=cast(Any, _get(table, "indivisible", str, "error")),
    )


def _grid(table: Mapping[str, Any], slot: str, grids: Mapping[str, Grid]) -> Grid | None:
    if slot not in table:
        return None
    name = _get(table, slot, str, "")
    if name not in grids:
        raise RecipeError(f"{slot} = {name!r} names no grid: there is {', '.join(grids) or 'none'}")
    return grids[name]


@contextmanager
def _place(name: str) -> Iterator[None]:
    """Puts `name` before the message of what goes wrong inside."""
    try:
        yield
    except (RecipeError, GridError) as error:
        raise type(error)(f"{name}: {error}") from None


def _get(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"{key} is {value!r}: want a {kind.__name__}")
    return value


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"unknown key {key!r} in {where}: there is {', '.join(known)}")
