"""Recipes: what is committed, what reads, and what is refused and how."""

import runpy
from pathlib import Path
from typing import Any

import pytest

import qkit
from qkit.engines.registry import ALIASES
from qkit.errors import RecipeError
from qkit.grid import Grid
from qkit.rules import Recipe, Rule, read_recipe, recipe_from_table, rule_from_table, rule_table

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "qkit_recipes"

GOOD = """
schema = 1
version = 3
summary = "for tests"
[grids.w]
element = "int4"
group = 64
[[rules]]
match = "head"
[[rules]]
match = ["*"]
weight = "w"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_committed_recipes_are_what_the_generator_writes() -> None:
    wanted: dict[str, str] = runpy.run_path(str(ROOT / "recipes" / "generate.py"))["files"]()
    assert {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.toml")} == wanted


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_every_committed_recipe_reads(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.name == file.stem
    assert recipe.summary
    whole = file.stem.endswith("-all")
    assert (recipe.rule_for("lm_head", "linear").weight is not None) == whole  # type: ignore[union-attr]
    assert (recipe.rule_for("model.embed_tokens", "embedding") is not None) == whole
    assert recipe.rule_for("model.layers.0.mlp.down_proj", "linear").weight is not None  # type: ignore[union-attr]


def test_plain_names_say_their_grid() -> None:
    for name in qkit.recipes():
        element, _, group = name.partition("-g")
        if element.startswith("int") and group.isdigit():
            assert qkit.recipe(name).rules[-1].weight == Grid(element, int(group))


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_resolves(alias: str) -> None:
    assert qkit.recipe(alias).name == ALIASES[alias]


def test_a_recipe_is_taken_by_name_by_path_and_as_an_object(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    recipe = qkit.recipe(file)
    assert recipe == qkit.recipe(str(file)) == qkit.recipe(recipe)
    assert (recipe.name, recipe.version, recipe.summary) == ("mine", 3, "for tests")
    assert recipe.rules == (Rule(("head",)), Rule(("*",), weight=Grid("int4", 64, "signed")))


def test_the_first_rule_that_matches_wins() -> None:
    first, second = Rule(("a.*",), weight=Grid("int4", 32)), Rule(("*",), weight=Grid("int8", 32))
    recipe = Recipe("two", (first, second))
    assert recipe.rule_for("a.b", "linear") is first
    assert recipe.rule_for("b.a", "linear") is second
    assert recipe.rule_for("a.b", "embedding") is None


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4-g64'"):
        qkit.recipe("int4-g46")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "schema is 2"),
        ("schema = 1", "", "schema is None"),
        ("schema = 1", "schema = true", "schema is True"),
        ("schema = 1", "schema = 1.0", r"schema is 1\.0"),
        ("version = 3", 'version = "3"', "version is '3': want a int"),
        ("version = 3", "version = true", "version is True"),
        ("version = 3", "version = 0", "version is 0: give a whole number from 1 on"),
        ("version = 3", "version = -3", "version is -3"),
        ("summary", "sumary", "unknown key 'sumary' in the recipe"),
        ('element = "int4"', 'element = "int7"', r"grids\.w: unknown element 'int7'"),
        ('element = "int4"', "element = 4", r"grids\.w: element is 4"),
        ('element = "int4"\n', "", r"grids\.w: element is missing"),
        ("group = 64", "", r"grids\.w: group is missing"),
        ("group = 64", "group = -1", r"grids\.w: group is -1"),
        ("group = 64", "group = true", r"grids\.w: group is True"),
        ("group = 64", 'group = 64\nscale = "rceil"', r"grids\.w: int4 has no scale rule 'rceil'"),
        ("group = 64", 'group = 64\nscale = ["signed"]', r"grids\.w: scale is \['signed'\]"),
        ("group = 64", 'group = 64\nzero = "x"', r"grids\.w: unknown key 'zero'"),
        ("[grids.w]", "[grids]\nv = 3\n[grids.w]", r"grids\.v: 3 is no grid"),
        ('match = "head"', "match = 5", r"rules\[1\]: match is 5"),
        ('match = "head"', 'match = "head"\nwight = "w"', r"rules\[1\]: unknown key 'wight'"),
        ('weight = "w"', 'weight = "v"', r"rules\[2\]: weight = 'v' names no grid: there is w"),
        ('weight = "w"', 'weight = "w"\nactivation = "v"', r"rules\[2\]: activation = 'v' names no grid"),
        ('weight = "w"', 'weight = "w"\nkind = "conv"', r"rules\[2\]: kind is 'conv'"),
        ('weight = "w"', 'weight = "w"\nactivation = "w"\nkind = "embedding"', r"rules\[2\]: .*drop the activation"),
        ('weight = "w"', 'weight = "w"\nindivisible = "pad"', r"rules\[2\]: indivisible is 'pad'"),
        ('match = ["*"]', "", r"rules\[2\]: match is \(\)"),
        ('match = ["*"]', 'match = [""]', r"rules\[2\]: match is .*give at least one pattern"),
        ('weight = "w"', "", r"grids\.w: not used by any rule"),
        ("[[rules]]", "[[rules]", ".*line"),
    ],
)
def test_a_malformed_recipe_names_the_file_and_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(RecipeError, match=r"mine\.toml: " + message):
        qkit.recipe(file)


@pytest.mark.parametrize("match", [5, [5], {"a": 1}, None], ids=["a number", "a list of numbers", "a table", "nothing"])
def test_a_match_that_is_no_text_is_refused(match: Any) -> None:
    with pytest.raises(RecipeError, match="match"):
        rule_from_table({"match": match})


def test_a_rule_with_a_malformed_grid_names_the_slot() -> None:
    with pytest.raises(RecipeError, match=r"^activation: element is missing"):
        rule_from_table({"match": "*", "weight": {"element": "int4", "group": 4}, "activation": {"group": 4}})


def test_a_version_below_one_cannot_exist() -> None:
    with pytest.raises(RecipeError, match="version is 0"):
        Recipe("none", (Rule(("*",), weight=Grid("int4", 64)),), version=0)


def test_a_recipe_that_quantizes_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing would be quantized"):
        recipe_from_table({"schema": 1, "rules": [{"match": "*"}]}, name="idle")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        qkit.recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", qkit.recipes())
def test_rules_survive_their_table(name: str) -> None:
    for rule in qkit.recipe(name).rules:
        assert rule_from_table(rule_table(rule)) == rule


def test_indivisible_at_the_top_is_that_of_every_rule_without_one(tmp_path: Path) -> None:
    top = GOOD.replace("version = 3", 'version = 3\nindivisible = "skip"')
    assert [rule.indivisible for rule in read_recipe(write(tmp_path, top)).rules] == ["skip", "skip"]
    own = top.replace('weight = "w"', 'weight = "w"\nindivisible = "error"')
    assert [rule.indivisible for rule in read_recipe(write(tmp_path, own)).rules] == ["skip", "error"]
    with pytest.raises(RecipeError, match=r"mine\.toml: indivisible is 'pad': choose one of error, skip"):
        read_recipe(write(tmp_path, top.replace('"skip"', '"pad"')))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_read_over(tmp_path: Path, newline: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", newline).encode())
    assert read_recipe(file) == read_recipe(write(tmp_path, GOOD))
    assert qkit.recipe(file).version == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_another_encoding_is_named_with_the_way_out(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + GOOD.encode(encoding))
    with pytest.raises(RecipeError, match="is text in UTF-16: save it as UTF-8"):
        read_recipe(file)
