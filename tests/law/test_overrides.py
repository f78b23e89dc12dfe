"""Options that change a recipe for one run."""

import pytest

import qkit
from qkit.engines.layer import Layer
from qkit.experts import PROJECTIONS
from qkit.overrides import check_ignored, overridden
from qkit.planning import plan

RECIPE = qkit.recipe("int4-g32-all")


def test_ignored_layers_of_every_kind_stay_in_float():
    changed = overridden(RECIPE, ignore=["*.mlp.*", "*embed*"])
    assert changed.rule_for("model.layers.0.mlp.up_proj", "linear").weight is None
    assert changed.rule_for("model.embed_tokens", "embedding").weight is None
    assert changed.rule_for("model.layers.0.self_attn.q_proj", "linear").weight == qkit.Grid("int4", 32)


def test_indivisible_layers_are_skipped():
    assert {rule.indivisible for rule in overridden(RECIPE, skip_indivisible=True).rules} == {"skip"}
    assert overridden(RECIPE) == RECIPE


def test_a_pattern_that_matches_nothing_is_refused():
    check_ignored(["a.*"], ["a.b", "c"])
    with pytest.raises(qkit.RecipeError, match=r"--ignore 'd\*' matches no layer of this model, which has a.b, c"):
        check_ignored(["a.*", "d*"], ["a.b", "c"])


@pytest.mark.parametrize("ignored", ["*.experts", "*embed*"])
def test_a_rule_whose_layers_are_all_ignored_fits_the_model(ignored):
    layers = [
        Layer("model.embed_tokens", "embedding", (64, 32), None),
        Layer("model.layers.0.up_proj", "linear", (64, 32), None),
        Layer(
            "model.layers.0.experts", "experts", (2, 192, 32), None, projections=dict.fromkeys(PROJECTIONS, (2, 64, 32))
        ),
    ]
    planned = plan(layers, overridden(qkit.recipe("int4-g32-all"), ignore=[ignored]))
    assert sum(one.rule is None for one in planned) == 1
    with pytest.raises(qkit.RecipeError, match=r"leaves no layer on a grid"):
        plan(layers, overridden(qkit.recipe("int4-g32-all"), ignore=["*"]))
