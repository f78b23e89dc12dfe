"""Values in notebooks: Coverage, Recipe, QTensor and parity tables as HTML, escaped and whole."""

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import qkit
from qkit import Grid, Recipe, Rule
from qkit.coverage_table import Coverage, Covered
from qkit.testing.parity import Parity, ParityTable, compare_many

EVIL = "<script>alert('x')</script>&"


class Cells(HTMLParser):
    """The text of every cell, and whether each tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def rows(value: Any) -> list[list[str]]:
    return Cells(value._repr_html_()).rows


def test_a_coverage_has_a_row_for_each_layer() -> None:
    covered = Covered("a.b", "linear", (8, 64), "int4-g64-signed", "", "", "prepared", 4.25)
    tied = Covered(EVIL, "linear", (8, 64), "", "", "", f"left alone: {EVIL}", 16.0, tied="a.b")
    head, first, second = rows(Coverage((covered, tied)))
    assert head[0] == "layer"
    assert first == ["a.b", "8x64", "int4-g64-signed", "", "", "4.25", "prepared"]
    assert second[0] == EVIL
    assert second[-1] == f"left alone: {EVIL}, tied to a.b"


@pytest.mark.parametrize("name", qkit.recipes())
def test_a_recipe_has_a_row_for_each_rule(name: str) -> None:
    recipe = qkit.recipe(name)
    found = rows(recipe)[1:]
    assert [row[2] for row in found] == [str(rule.weight or "left alone") for rule in recipe.rules]
    assert [row[3] for row in found] == [str(rule.activation or "") for rule in recipe.rules]


def test_a_name_is_escaped() -> None:
    recipe = Recipe(EVIL, (Rule((EVIL,), weight=Grid("int4", 64)),), summary=EVIL)
    assert "<script" not in recipe._repr_html_()
    assert rows(recipe)[1][0] == EVIL


@pytest.mark.parametrize("grid", [Grid("int4", 32), Grid("int4", 32, "minmax"), Grid("e2m1", 16, "nvfp4")], ids=str)
def test_a_quantized_tensor_has_a_row_for_each_part(grid: Grid) -> None:
    q = qkit.quantize(np.ones((4, 64), np.float32), grid)
    found = {row[0]: row[1:] for row in rows(q)[1:]}
    assert found.keys() == q.parts().keys()
    assert found["codes"] == [str(q.codes.dtype), "[4, 64]", "256"]
    assert str(grid) in q._repr_html_()


def test_parities_have_a_row_each() -> None:
    engine, grids = qkit.backend("numpy"), [Grid("int4", 32), Grid("e2m1", 32)]
    table = ParityTable(compare_many(engine, grids, dtype="float32", compiled=False, size=100))
    assert [row[0] for row in rows(table)[1:]] == list(map(str, grids))
    assert "2 of 2 comparisons" in table._repr_html_()
    failed = Parity("x", grids[0], "float32", compiled=True, error=EVIL)
    assert rows(failed)[1][-1] == EVIL
    assert rows(failed)[1][1] == "x compiled"
