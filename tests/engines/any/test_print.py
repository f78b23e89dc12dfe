"""`print(model)` shows the grid of every quantized layer, on every engine with modules."""

import pytest
from models import small
from tables import MODULES, TRAINERS

import qkit

RECIPES = {
    "int4-g32-all": "grid=int4-g32-signed",
    "mxfp4": "grid=e2m1-g32-rceil @ e2m1-g32-rceil",
    "int2-g64-learned": "grid=int2-g64-signed",
    "float8-dynamic-act-float8-weight": "grid=e4m3-row-rceil @ e4m3-row-rceil",
    "nvfp4-a16": "grid=e2m1-g16-nvfp4",
}


def network(name):
    """An embedding and two linear layers of the framework itself."""
    if name == "torchao":
        from torch import nn
    else:
        import mlx.nn as nn
    return nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.mark.parametrize("stage", ["prepare", "convert"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODULES)
def test_a_printed_model_shows_the_grid_of_each_layer(name, recipe, stage):
    before = str(network(name))
    assert "grid=" not in before
    model = getattr(qkit, stage)(network(name), recipe)
    lines = [line for line in str(model).splitlines() if "grid=" in line]
    assert len(lines) == (3 if recipe.endswith("-all") else 2)
    assert all(RECIPES[recipe] in line for line in lines)
    if stage == "prepare":
        assert all("learned" in line for line in lines) == recipe.endswith("-learned")


@pytest.mark.parametrize("name", TRAINERS)
def test_a_printed_language_model_shows_the_grid_of_each_of_its_layers(name):
    model = qkit.prepare(small(name), "int4-g32")
    assert str(model).count("grid=int4-g32-signed") >= 1
    rows = [row for row in qkit.coverage(qkit.convert(model)).rows if row.weight]
    assert rows
    shown = str(model)
    assert shown.count("grid=int4-g32-signed") >= (len(rows) // 2)  # torch prints equal blocks once
    assert "grid=" in shown
