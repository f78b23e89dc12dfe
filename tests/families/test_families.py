"""The gate: every family's artifact opens, equal, in every reader, or `plan` says by name which reader does not open it."""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from catalogue import FAMILIES
from gate import RECIPES, WORDS, judged, row, word

from qkit.artifact import known
from qkit.streaming.caveats import Caveat

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models and special tokens


def mark(name):
    return pytest.param(name, marks=() if FAMILIES[name].quick else pytest.mark.families)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [mark(name) for name in FAMILIES if name in known.table()["rows"]])
def test_an_artifact_opens_equal_or_the_plan_says_that_it_does_not(name, recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = row(name, recipe)
    assert {reader: cell for reader, cell in cells.items() if word(cell) == "wrong"} == {}
    stated = known.table()["rows"][name][recipe]
    assert {reader: word(cell) for reader, cell in cells.items()} == {
        reader: word(cell) for reader, cell in stated.items()
    }  # as the page says


def test_no_cell_of_the_table_is_wrong():
    cells = [cell for row in known.table()["rows"].values() for recipe in RECIPES for cell in row[recipe].values()]
    assert {word(cell) for cell in cells} <= set(WORDS) - {"wrong"}
    assert len(cells) > 3000


def test_values_that_no_rule_warns_of_are_wrong():
    rule, tabled = Caveat("transformers", "a cause"), Caveat("transformers", "a result", tabled=True)
    for found, caveats, reader, said in (
        ("off by 0.3", [], "transformers", "wrong"),
        ("off by 0.3", [tabled], "transformers", "wrong"),
        ("off by 0.3", [Caveat("mlx-lm", "a cause")], "transformers", "wrong"),
        ("off by 0.3", [rule], "transformers", "warned"),
        ("off by 0.3", [Caveat("qkit, MLX", "a cause")], "qkit, MLX", "wrong"),
        ("fails: ValueError", [], "transformers", "wrong"),
        ("fails: ValueError", [tabled], "transformers", "fails"),
        ("differs in float: off by 0.3", [], "mlx-lm", "wrong"),
        ("differs in float: off by 0.3", [Caveat("mlx-lm", "a cause")], "mlx-lm", "differs in float"),
        ("differs in float: off by 0.3", [Caveat("qkit, MLX", "a cause")], "qkit, MLX", "wrong"),
    ):
        assert word(judged(reader, found, caveats)) == said
