"""Recipes: named, versioned lists of rules for the layers of a model, read from flat TOML. The first rule that matches wins."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from qkit.errors import GridError, RecipeError
from qkit.grid import Grid, want_chosen, want_grid
from qkit.parts import Part, is_in
from qkit.tables import place, value_of, want_known

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

Kind = Literal["linear", "embedding", "experts"]
KINDS: tuple[Kind, ...] = ("linear", "embedding", "experts")
Range = Literal["dynamic", "calibrated", "average"]
Ste = Literal["identity", "masked"]
Scales = Literal["rule", "learned", "alone"]
Rounding = Literal["nearest", "learned"]
SCHEMA = 1
CORE_KEYS = ("match", "kind", "weight", "part", "indivisible", "rounding")  #: keys of a rule that the core carries out
PATTERNS = 1000  #: most patterns and rules of a recipe file: each is compared with each layer
PATTERN = 1000  #: most characters of a pattern
EXPERTS = "*.experts.*"  #: the pattern of a rule for experts that names none
GRIDS = ("weight", "activation", "output")  #: keys of a rule that name a grid
TYPES = {"kind": Kind, "range": Range, "ste": Ste, "scales": Scales, "rounding": Rounding, "part": Part}
#: By key, the values that a rule takes.
CHOICES: Mapping[str, Sequence[str]] = {**{k: get_args(t) for k, t in TYPES.items()}, "indivisible": ("error", "skip")}


@dataclass(frozen=True, slots=True)
class Rule:
    """The quantization of layers whose path matches.

    Attributes:
        match: shell patterns (`*`, `?`, `[...]`) for the dotted path of a layer; one that matches is enough.
        kind: `linear`, `embedding`, or `experts`: all experts of a block, whose projections are on one grid. Their path is
            that of the block, `model.layers.0.mlp.experts`, and a pattern may end in `.*`, too.
        weight: the weight's grid, or None to leave the layer alone.
        activation: the input's grid, quantized at every call in training and after conversion; or None.
        output: the output's grid, quantized like the input; or None.
        range: where the scales of `activation` and `output` come from. `dynamic`: from each tensor itself. Static ones need
            a `"tensor"` grid: `calibrated`, from the lowest and highest value seen under `qkit.calibrating`; `average`,
            from a running average of these over the training steps (what gradient checkpointing computes again counts again).
        ste: the straight-through estimator of all three grids: the gradient passes everywhere (`identity`), or only where no
            value was clipped (`masked`).
        scales: where the scales of `weight` come from in training: the grid's own rule (`rule`), or they train beside the weight
            (`learned`, see `qkit.reference.learned`), whose gradient is then masked; or `alone`, while codes stay as they are.
        rounding: `nearest`, or `learned` from a text where nobody trains, see `qkit.calibration.calibrate_drift`.
        part: `all` of the model, or `language`: without towers of vision and audio, see `qkit.parts`.
        indivisible: for a weight that does not divide into groups: `error`, or `skip` the layer.
    """

    match: tuple[str, ...]
    kind: Kind = "linear"
    weight: Grid | None = None
    activation: Grid | None = None
    output: Grid | None = None
    range: Range = "dynamic"
    ste: Ste = "identity"
    scales: Scales = "rule"
    rounding: Rounding = "nearest"
    part: Part = "all"
    indivisible: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not self.match or not all(isinstance(pattern, str) and pattern for pattern in self.match):
            raise RecipeError(f"match is {self.match!r}: give at least one pattern, such as '*'")
        for key, choices in CHOICES.items():
            if (value := getattr(self, key)) not in choices:
                raise RecipeError(f"{key} is {value!r}: choose one of {', '.join(choices)}")
        for slot in GRIDS:
            if (grid := getattr(self, slot)) is not None:
                want_grid(grid)
        for grid in self.slots.values():
            want_chosen(grid)
        alone = self.scales == "alone" and self.weight is not None and self.weight.element.kind == "float"
        if self.scales != "rule" and (self.weight is None or self.weight.scale == "nvfp4" or alone):
            what = "needs a weight grid" if self.weight is None else f"is not there for {self.weight}: leave it out"
            raise RecipeError(f'scales = "{self.scales}" {what}')
        if self.rounding == "learned" and (not self.weight or self.kind != "linear" or self.weight.group == "tensor"):
            raise RecipeError(
                'rounding = "learned" is for linear layers with a weight grid of groups or rows: leave it out'
            )
        if self.slots and not self.weight:
            raise RecipeError(f"a rule with an {' and an '.join(self.slots)} grid needs a weight grid")
        if self.slots and self.kind == "embedding":
            raise RecipeError(f"an embedding's input is a token number: drop the {' and the '.join(self.slots)} grid")
        self._check_range()

    def _check_range(self) -> None:
        if self.range == "dynamic":
            return
        if not self.slots:
            raise RecipeError(f"range = {self.range!r} is for activations: give an activation or an output grid")
        for slot, grid in self.slots.items():
            if grid.group != "tensor":
                raise RecipeError(
                    f"{slot} is on {grid}, whose scales follow the shape of each input: range = {self.range!r} wants group "
                    '"tensor"'
                )

    @property
    def slots(self) -> "dict[str, Grid]":
        """The grids of input and output by name, `activation` and `output`; absent where there is none."""
        named = {"activation": self.activation, "output": self.output}
        return {name: grid for name, grid in named.items() if grid}

    @property
    def engine_keys(self) -> dict[str, str]:
        """The keys that an engine has to honour for this rule, with their values: not `CORE_KEYS`, and not at their default."""
        keys = [(one.name, one.default) for one in fields(self) if one.name not in CORE_KEYS]
        return {key: str(getattr(self, key)) for key, default in keys if getattr(self, key) != default}

    def matches(self, path: str, kind: Kind) -> bool:
        """Whether the rule applies to the layer at `path`."""
        if kind != self.kind or not is_in(path, self.part):
            return False
        paths = (path, f"{path}.") if kind == "experts" else (path,)
        return any(fnmatchcase(one, pattern) for one in paths for pattern in self.match)


#: The keys that name no grid and may be left out.
DEFAULTS = {one.name: one.default for one in fields(Rule) if isinstance(one.default, str) and one.name != "kind"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules for a whole model. The version changes when any number it produces does."""

    name: str
    rules: tuple[Rule, ...]
    version: int = 1
    summary: str = ""

    def __post_init__(self) -> None:
        if self.version < 1:
            raise RecipeError(f"version is {self.version}: give a whole number from 1 on")
        if not any(rule.weight for rule in self.rules):
            raise RecipeError(
                f"recipe {self.name!r} has no rule with a weight grid: nothing would be quantized: give a rule one"
            )

    def rule_for(self, path: str, kind: Kind, *, head: bool = False) -> Rule | None:
        """The first rule that matches, if any. A layer that is an output `head` also goes by the path `lm_head`."""
        names = (path, *["lm_head"] * head)
        return next((rule for rule in self.rules if any(rule.matches(name, kind) for name in names)), None)

    def _repr_html_(self) -> str:
        from qkit.notebook import table  # here, so that `import qkit` stays cheap

        caption = f"{self.name}, version {self.version}: {self.summary}".rstrip(": ")
        head = ("layers", "kind", "weight", "activation", "output")
        return table(caption, head, ((", ".join(one.match), one.kind, *map(str, _grids_of(one))) for one in self.rules))


def _grids_of(rule: Rule) -> "tuple[Grid | str, ...]":
    return rule.weight or "left alone", rule.activation or "", rule.output or ""


def read_recipe(file: "Path | Traversable") -> Recipe:
    """The recipe in a TOML file; its name is the file's.

    Raises:
        RecipeError: the file is missing or malformed; the message names the file and the key.
    """
    from qkit.intake import read_text  # here, so that `import qkit` stays cheap

    try:
        text = read_text(file) if isinstance(file, os.PathLike) else file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: {error}") from None
    return parse_recipe(text, name=file.name.removesuffix(".toml"), source=str(file))


def parse_recipe(text: str, *, name: str, source: str) -> Recipe:
    """The recipe in the text of a TOML file; messages begin with `source`.

    Raises:
        RecipeError: it is malformed; the message names the key.
    """
    import tomllib  # here, so that `import qkit` stays cheap

    from qkit.intake import check_values

    try:
        table = tomllib.loads(text)
        check_values(table)
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{source}: it is nested too deep: write flat tables") from None
    try:
        return recipe_from_table(table, name=name)
    except (RecipeError, GridError) as error:
        raise RecipeError(f"{source}: {error}") from None


def recipe_from_table(table: Mapping[str, Any], *, name: str) -> Recipe:
    """The recipe that a parsed TOML table describes. Rules without `indivisible` have that of the top.

    Raises:
        RecipeError: a key is unknown, missing or of the wrong type.
        GridError: a grid does not exist.

    Messages begin with the place, `grids.w` or `rules[2]`, counted from 1.
    """
    want_known(table, ("schema", "version", "summary", "indivisible", "grids", "rules"), "the recipe")
    schema = table.get("schema")
    if type(schema) is not int or schema != SCHEMA:  # `true == 1`
        raise RecipeError(f"schema is {schema!r}: this version of qkit reads schema = {SCHEMA}")
    grids, rules = {}, []
    for key, value in value_of(table, "grids", dict, {}).items():
        with place(f"grids.{key}"):
            grids[key] = grid_from_table(value)
            want_chosen(grids[key])
    indivisible = value_of(table, "indivisible", str, DEFAULTS["indivisible"])
    if indivisible not in CHOICES["indivisible"]:
        raise RecipeError(f"indivisible is {indivisible!r}: choose one of {', '.join(CHOICES['indivisible'])}")
    for number, value in enumerate(value_of(table, "rules", list, []), start=1):
        with place(f"rules[{number}]"):
            rules.append(_rule(value, grids, {**DEFAULTS, "indivisible": indivisible}))
    if len(rules) + sum(len(rule.match) for rule in rules) > PATTERNS:
        raise RecipeError(f"rules: they have more than {PATTERNS:,} patterns: write fewer, with * in them")
    summary, version = value_of(table, "summary", str, ""), value_of(table, "version", int, 1)
    used = {grid for rule in rules for grid in (rule.weight, *rule.slots.values())}
    for key, grid in grids.items():
        if grid not in used:
            raise RecipeError(f"grids.{key}: not used by any rule: name it in one, or remove it")
    return Recipe(name=name, rules=tuple(rules), version=version, summary=summary)


def grid_from_table(table: Any) -> Grid:
    """The grid that `{element, group, scale}` describes; `scale` may be left out."""
    if not isinstance(table, Mapping):
        raise RecipeError(f"{table!r} is no grid: want a table with element and group")
    want_known(table, ("element", "group", "scale"), "a grid")
    for want in ("element", "group"):
        if want not in table:
            raise RecipeError(f"{want} is missing")
    scale = value_of(table, "scale", str, "") if "scale" in table else None
    return Grid(value_of(table, "element", str, ""), table["group"], scale)


def grid_table(grid: Grid) -> dict[str, Any]:
    """The inverse of `grid_from_table`, complete."""
    return {"element": grid.element.name, "group": grid.group, "scale": grid.scale}


def rule_table(rule: Rule) -> dict[str, Any]:
    """A rule with its grids written out, for files."""
    table: dict[str, Any] = {"match": list(rule.match), "kind": rule.kind}
    for key, default in DEFAULTS.items():
        if getattr(rule, key) != default:
            table[key] = getattr(rule, key)
    for slot in GRIDS:
        if grid := getattr(rule, slot):
            table[slot] = grid_table(grid)
    return table


def rule_from_table(table: Mapping[str, Any]) -> Rule:
    """The inverse of `rule_table`."""
    grids = {}
    for slot in [one for one in GRIDS if one in table]:
        with place(slot):
            grids[slot] = grid_from_table(table[slot])
    return _rule({**table, **{slot: slot for slot in grids}}, grids)


def _rule(table: Any, grids: Mapping[str, Grid], defaults: Mapping[str, str] = DEFAULTS) -> Rule:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{table!r} is no rule: write [[rules]]")
    want_known(table, ("match", "kind", *GRIDS, *DEFAULTS), "a rule")
    match = table.get("match", EXPERTS if table.get("kind") == "experts" else ())
    if not isinstance(match, (str, list, tuple)):
        raise RecipeError(f"match is {match!r}: give a pattern or a list of them")
    patterns = (match,) if isinstance(match, str) else tuple(match)
    if any(isinstance(pattern, str) and len(pattern) > PATTERN for pattern in patterns):
        raise RecipeError(f"match has a pattern of more than {PATTERN:,} characters: write a shorter one")
    return Rule(
        match=patterns,
        kind=cast(Kind, value_of(table, "kind", str, "linear")),
        **cast(Any, {slot: _grid(table, slot, grids) for slot in GRIDS}),
        **cast(Any, {key: value_of(table, key, str, default) for key, default in defaults.items()}),
    )


def _grid(table: Mapping[str, Any], slot: str, grids: Mapping[str, Grid]) -> Grid | None:
    if slot not in table:
        return None
    name = value_of(table, slot, str, "")
    if name not in grids:
        raise RecipeError(f"{slot} = {name!r} names no grid: there is {', '.join(grids) or 'none'}")
    return grids[name]
