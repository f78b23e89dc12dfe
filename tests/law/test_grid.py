"""Grids: what exists, what is refused, and the shapes that follow."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import qkit
from qkit.element import ELEMENTS, element, reciprocal
from qkit.errors import GridError
from qkit.grid import Grid
from qkit.rules import Recipe, Rule
from qkit.testing import all_grids, random


@pytest.mark.parametrize(
    ("x", "pattern"),
    [
        (7, 0x3E124925),
        (15, 0x3D888889),
        (127, 0x3C010204),
        (255, 0x3B808081),
        (6, 0x3E2AAAAB),
        (448, 0x3B124925),
        (2688, 0x39C30C31),
    ],
)
def test_reciprocals_are_the_multipliers_of_numerics_r2(x: float, pattern: int) -> None:
    assert np.float32(reciprocal(x)).view(np.uint32) == pattern


def test_integer_ranges() -> None:
    assert [(e.lowest, e.highest, e.levels) for e in (element("int2"), element("int5"), element("int8"))] == [
        (-2, 1, 3),
        (-16, 15, 31),
        (-128, 127, 255),
    ]


def test_float_ranges() -> None:
    assert {name: (e.largest, e.max_exponent) for name, e in ELEMENTS.items() if e.kind == "float"} == {
        "e2m1": (6.0, 2),
        "e4m3": (448.0, 8),
        "e5m2": (57344.0, 15),
    }


@pytest.mark.parametrize(
    ("name", "rule"),
    [("int2", "signed"), ("int6", "signed"), ("int8", "absmax"), ("e2m1", "rceil"), ("e4m3", "rceil")],
)
def test_the_default_rule_follows_the_element(name: str, rule: str) -> None:
    assert Grid(name, 32) == Grid(name, 32, rule)
    assert str(Grid(name, 32)) == f"{name}-g32-{rule}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int7", 32), "unknown element 'int7': choose one of int2"),
        (("int4", 0), "group is 0"),
        (("int4", -1), "group is -1"),
        (("int4", True), "group is True"),
        (("int4", 32.0), r"group is 32\.0"),
        (("int4", "column"), "group is 'column'"),
        (("int4", 32, "rceil"), "int4 has no scale rule 'rceil'"),
        (("e2m1", 32, "signed"), "e2m1 has no scale rule 'signed'"),
        (("e2m1", 32, "nvfp4"), "groups of 16"),
        (("e4m3", 16, "nvfp4"), "groups of 16"),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(GridError, match=message):
        Grid(*arguments)  # type: ignore[arg-type]


def test_scale_shapes() -> None:
    assert Grid("int4", 32).scale_shape((3, 5, 64)) == (3, 5, 2)
    assert Grid("int4", "row").scale_shape((3, 5, 64)) == (3, 5, 1)
    assert Grid("int4", "tensor").scale_shape((3, 5, 64)) == (1, 1, 1)
    assert Grid("int4", 64).scale_shape((64,)) == (1,)


def test_group_shapes_hold_every_element() -> None:
    assert Grid("int4", 32).group_shape((3, 64)) == (3, 2, 32)
    assert Grid("int4", "row").group_shape((3, 64)) == (3, 1, 64)
    assert Grid("int4", "tensor").group_shape((3, 64)) == (1, 1, 192)


def test_a_width_that_does_not_divide_names_a_way_out() -> None:
    with pytest.raises(GridError, match='172 inputs do not divide into groups of 64: use group 43 or "row"'):
        Grid("int4", 64).scale_shape((8, 172))
    with pytest.raises(GridError, match=r'use "row"$'):
        Grid("int4", 64).scale_shape((8, 67))


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 64)])
@pytest.mark.parametrize("group", [64, "row", "tensor"])
def test_empty_and_zero_dimensional_shapes_are_refused(shape: tuple[int, ...], group: object) -> None:
    with pytest.raises(GridError, match="no last axis, or no elements"):
        Grid("int4", group).scale_shape(shape)  # type: ignore[arg-type]


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert Grid("int4", 64).bits_per_weight((8, 128)) == 4 + 16 / 64
    assert Grid("int4", 64, "minmax").bits_per_weight((8, 128)) == 4 + 20 / 64
    assert Grid("e2m1", 32).bits_per_weight((8, 128)) == 4.25
    assert Grid("e2m1", 16, "nvfp4").bits_per_weight((8, 128)) == 4.5 + 32 / 1024


def test_grids_are_values() -> None:
    grids = all_grids()
    assert len(set(grids)) == len(grids) == len({str(grid) for grid in grids})
    assert Grid(element("int4"), 64) == Grid("int4", 64)


@pytest.mark.parametrize("grid", all_grids(), ids=str)
def test_parse_is_the_inverse_of_str(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown element ''"),
        ("int4", "has no scale rule ''"),
        ("int4-g64", "has no scale rule ''"),
        ("int9-g64-signed", "unknown element 'int9'"),
        ("int4-64-signed", "write 'int4-g64-signed'"),
        ("int4-g064-signed", "write 'int4-g64-signed'"),
        ("int4-g-signed", "group is 'g'|group is ''"),
        ("int4-g0-signed", "group is 0"),
        ("int4-column-signed", "group is 'column'"),
        ("int4-g64-rceil", "has no scale rule 'rceil'"),
        ("int4-g64-signed-", "has no scale rule 'signed-'"),
        ("e2m1-g32-nvfp4", "nvfp4 scales belong to e2m1 in groups of 16"),
    ],
)
def test_text_that_no_grid_prints_is_refused(text: str, says: str) -> None:
    with pytest.raises(GridError, match=says):
        Grid.parse(text)


@pytest.mark.parametrize("call", [qkit.quantize, qkit.fake_quantize])
def test_a_recipe_with_one_weight_grid_stands_for_it(call: Any) -> None:
    w = random((4, 128), 1)
    for recipe in ("int4-g64", "W4A16", qkit.recipe("int8-dynamic-act-int4-weight")):
        (grid,) = {rule.weight for rule in qkit.recipe(recipe).rules if rule.weight}
        got, want = call(w, recipe), call(w, grid)
        if call is qkit.quantize:
            assert got.grid == grid
            got, want = qkit.dequantize(got), qkit.dequantize(want)
        assert np.array_equal(got, want)


@pytest.mark.parametrize("call", [qkit.quantize, qkit.fake_quantize])
def test_what_is_no_grid_is_refused_with_the_way_to_one(call: Any) -> None:
    w = random((4, 128), 1)
    two = Recipe("two", (Rule(("head",), weight=Grid("int8", 64)), Rule(("*",), weight=Grid("int4", 64))))
    for choice, says in (
        (64, r"64 is no grid, which is an element, a group and a scale rule: write qkit\.Grid\('int4', 64\)"),
        (None, "None is no grid"),
        ("int4-g46", r"'int4-g46' is neither a grid, such as qkit\.Grid.*nor a recipe: .*did you mean 'int4-g"),
        (
            two,
            r"recipe 'two' has 2 weight grids, int8-g64-absmax, int4-g64-signed: choose one, such as qkit\.Grid\.parse",
        ),
    ):
        with pytest.raises(GridError, match=says):
            call(w, choice)


@pytest.mark.parametrize("slot", ["weight", "activation", "output"])
def test_a_rule_and_a_quantized_tensor_refuse_text_for_a_grid(slot: str) -> None:
    grids: dict[str, Any] = {"weight": Grid("int4", 64), slot: "int4-g64"}
    with pytest.raises(GridError, match="'int4-g64' is no grid, which is"):
        Rule(("*",), **grids)
    with pytest.raises(GridError, match="'int4-g64' is no grid, which is"):
        replace(qkit.quantize(random((4, 128), 1), Grid("int4", 64)), grid="int4-g64")


@pytest.mark.parametrize("call", [qkit.reference.quantize, qkit.reference.fake_quantize, qkit.reference.unclipped])
def test_the_law_refuses_text_for_a_grid(call: Any) -> None:
    with pytest.raises(GridError, match="'int4-g64' is no grid, which is"):
        call(random((4, 128), 1), "int4-g64")
