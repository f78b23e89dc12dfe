"""The gate: every family's artifact opens, equal, in every reader, or `plan` says by name which reader does not open it."""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from catalogue import FAMILIES
from gate import RECIPES, row, said

from qkit.artifact import known

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models and special tokens


GOOD = ("equal", "none")


def mark(name):
    return pytest.param(name, marks=() if FAMILIES[name].quick else pytest.mark.families)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [mark(name) for name in FAMILIES if name in known.table()["rows"]])
def test_an_artifact_opens_equal_or_the_plan_says_that_it_does_not(name, recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = row(name, recipe)
        warned = said(name, recipe)
    assert {reader: cell for reader, cell in cells.items() if cell not in GOOD and reader not in warned} == {}
    stated = known.table()["rows"][name][recipe]
    assert [
        reader for reader in cells if stated[reader] in GOOD and cells[reader] not in GOOD
    ] == []  # as the page says
