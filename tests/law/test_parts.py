"""The language part of a model, and the towers beside it."""

import pytest

import qkit
from qkit.engines.layer import Layer
from qkit.parts import is_in
from qkit.planning import TOWERS, plan

TOWER = [
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "model.visual.blocks.0.attn.qkv",
    "visual.merger.mlp.0",
    "model.audio_tower.layers.0.fc1",
    "multi_modal_projector.linear_1",
    "model.connector.modality_projection.proj",
    "vision_model.encoder.layers.1.mlp.fc2",
]
LANGUAGE = [
    "model.layers.0.mlp.up_proj",
    "language_model.model.layers.0.self_attn.q_proj",
    "model.encoder.layers.0.fc1",
    "vit.encoder.layer.0.output.dense",
    "text_model.encoder.layers.0.mlp.fc1",
]


@pytest.mark.parametrize("path", TOWER)
def test_layers_of_towers_are_not_in_the_language_part(path):
    assert not is_in(path, "language")
    assert is_in(path, "all")


@pytest.mark.parametrize("path", LANGUAGE)
def test_other_layers_are(path):
    assert is_in(path, "language")


@pytest.mark.parametrize("name", qkit.recipes())
def test_recipes_that_come_with_qkit_leave_towers_in_float_and_say_so(name):
    shape = (512, 512)
    layers = [Layer(path, "linear", shape, None) for path in (*TOWER, *LANGUAGE)]
    extra = [Layer("model.embed_tokens", "embedding", shape, None), Layer("m.experts", "experts", (2, *shape), None)]
    recipe = qkit.recipe(name)
    kinds = {rule.kind for rule in recipe.rules}
    planned = {item.layer.path: item for item in plan([*layers, *(one for one in extra if one.kind in kinds)], recipe)}
    assert {planned[path].reason for path in TOWER} == {TOWERS}
    assert all(planned[path].rule for path in LANGUAGE)


def test_a_recipe_of_a_users_own_takes_the_whole_model_unless_it_says_language():
    grid = qkit.Grid("int8", "row")
    whole, part = (qkit.Recipe("r", (qkit.Rule(("*",), weight=grid, **more),)) for more in ({}, {"part": "language"}))
    assert whole.rule_for(TOWER[0], "linear") is not None
    assert part.rule_for(TOWER[0], "linear") is None
    with pytest.raises(qkit.RecipeError, match="part is 'vision': choose one of all, language"):
        qkit.Rule(("*",), weight=grid, part="vision")
