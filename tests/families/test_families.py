"""The gate: every family's artifact opens, equal, in every reader, or `plan` says by name which reader does not open it."""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

from catalogue import FAMILIES
from gate import RECIPES, row

pytestmark = [
    pytest.mark.families,
    pytest.mark.filterwarnings("ignore"),  # transformers' own, about small models and special tokens
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_artifact_opens_equal_or_the_plan_says_that_it_does_not(name, recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = row(name, recipe)
    assert {reader: cell for reader, cell in cells.items() if cell.startswith(("wrong", "fails"))} == {}
