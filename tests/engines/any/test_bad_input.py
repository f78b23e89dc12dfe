"""Bad input is refused, and a refusal leaves the user's model as it was. On every engine that is installed."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from tables import MODULES as MODULE_ENGINES
from tables import READY as ENGINES

import qkit
from qkit import Grid, Recipe, Rule

GRID = Grid("int4", 32)
RECIPE = Recipe("test", (Rule(("*",), weight=GRID),))
EVERY_RULE = [
    *(Grid("int4", 32, rule) for rule in ("signed", "absmax", "midmax", "minmax")),
    Grid("e2m1", 32),
    Grid("e4m3", "row"),
    Grid("e2m1", 16, "nvfp4"),
]


def array(name, values, dtype=np.float32):
    return qkit.backend(name).from_numpy(np.asarray(values).astype(dtype))


def network(name, edit=None, widths=(64, 96, 32)):
    """Linear layers of these widths whose first weight went through `edit`; the framework's own modules."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((out, n)).astype(np.float32) for n, out in pairwise(widths)]
    if edit:
        edit(weights[0])
    engine = qkit.backend(name)
    if name == "torchao":
        from torch import nn

        layers = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
        model = nn.Sequential(*layers)
    else:
        import mlx.nn as nn

        layers = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
        model = nn.Sequential(*layers)
    tensors = {key: engine.to_numpy(value).copy() for key, value in engine.tensors(model).items()}
    for key, weight in zip((key for key in list(tensors) if key.endswith("weight")), weights, strict=True):
        tensors[key] = weight
    engine.fill(model, tensors)
    return model


def state(name, model):
    """Everything a refusal must not change: classes, values, what coverage says."""
    engine = qkit.backend(name)
    kinds = [(layer.path, type(layer.module), layer.stage) for layer in engine.layers(model)]
    return kinds, {key: engine.to_numpy(value).tobytes() for key, value in engine.tensors(model).items()}


def poison(value):
    def edit(weight):
        weight[3, 5] = value

    return edit


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize("grid", EVERY_RULE, ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_quantize_refuses_what_has_no_codes(name, grid, value):
    w = np.ones((2, 64), np.float32)
    poison_at = w.reshape(-1)
    poison_at[7] = value
    with pytest.raises(qkit.RangeError, match="the array holds"):
        qkit.quantize(array(name, w), grid)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_convert_names_the_layer_and_leaves_the_model(name, value):
    for prepared in (False, True):
        model = network(name, poison(value))
        if prepared:
            model = qkit.prepare(model, RECIPE)
        before = state(name, model)
        with pytest.raises(qkit.RangeError, match=r"0\.weight holds"):
            qkit.convert(model) if prepared else qkit.convert(model, RECIPE)
        assert state(name, model) == before


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_an_indivisible_width_is_named_with_the_way_out(name):
    model = network(name, widths=(64, 172, 32))
    before = state(name, model)
    for verb in (qkit.prepare, qkit.convert):
        with pytest.raises(qkit.GridError, match=r'1: 172 inputs do not divide into groups of 32: to .* or use "row"$'):
            verb(model, RECIPE)
    assert state(name, model) == before


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_skip_leaves_an_indivisible_layer_and_says_so(name):
    skipping = Recipe("test", (Rule(("*",), weight=GRID, indivisible="skip"),))
    model = qkit.convert(network(name, widths=(64, 172, 32)), skipping)
    rows = qkit.coverage(model).rows
    assert rows[0].weight == "int4-g32-signed"
    assert rows[1].state.startswith("left alone: skipped: 172 inputs")


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_a_rule_that_matches_nothing_is_an_error(name):
    model = network(name)
    before = state(name, model)
    with pytest.raises(qkit.RecipeError, match=r"the rule for linear no\.such\.\* is first for no layer"):
        qkit.prepare(model, Recipe("test", (Rule(("no.such.*",), weight=GRID), Rule(("*",), weight=GRID))))
    assert state(name, model) == before


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_stages_come_in_order(name):
    with pytest.raises(qkit.StageError, match="no layer of this model is prepared"):
        qkit.convert(network(name))
    prepared = qkit.prepare(network(name), RECIPE)
    with pytest.raises(qkit.StageError, match="is prepared already"):
        qkit.prepare(prepared, RECIPE)
    with pytest.raises(qkit.StageError, match="is prepared already"):
        qkit.convert(prepared, RECIPE)
    with pytest.raises(qkit.StageError, match="prepared but not converted"):
        qkit.save(prepared, "never-written")
    converted = qkit.convert(prepared)
    for verb in (qkit.prepare, qkit.convert):
        with pytest.raises(qkit.StageError, match="is converted already"):
            verb(converted, RECIPE)


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_an_unknown_recipe_names_the_nearest(name):
    model = network(name)
    before = state(name, model)
    with pytest.raises(qkit.RecipeError, match="did you mean 'int4-g64'"):
        qkit.prepare(model, "int4-g46")
    assert state(name, model) == before


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("verb", [qkit.quantize, qkit.fake_quantize], ids=lambda verb: verb.__name__)
def test_only_floats_are_quantized(name, verb):
    with pytest.raises(qkit.DTypeError, match="cannot quantize an array of int32"):
        verb(array(name, np.ones((2, 64)), np.int32), GRID)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (4, 0), ()], ids=str)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("verb", [qkit.quantize, qkit.fake_quantize], ids=lambda verb: verb.__name__)
def test_empty_and_zero_dimensional_arrays_are_refused(name, shape, verb):
    with pytest.raises(qkit.GridError, match="it has no last axis, or no elements"):
        verb(array(name, np.zeros(shape)), GRID)


@pytest.mark.parametrize("grid", EVERY_RULE, ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_a_group_of_zeros_stays_zero(name, grid):
    engine = qkit.backend(name)
    q = qkit.quantize(array(name, np.zeros((2, 64))), grid)
    assert not engine.to_numpy(q.codes).any()
    assert not engine.to_numpy(qkit.dequantize(q)).any()
    scales = engine.to_numpy(q.scales)
    if grid.element.kind == "integer":
        assert (scales == np.float32(2.0**-96)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("grid", EVERY_RULE, ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_subnormals_and_the_largest_magnitudes_give_finite_values(name, grid, dtype):
    engine = qkit.backend(name)
    largest = 1.6e38 if dtype is not np.float16 else 3e4
    for value in (float(ml_dtypes.finfo(dtype).smallest_subnormal), 1e-39, largest):
        w = np.full((2, 64), value, np.float32)
        w[:, ::3] *= -1
        values = engine.to_numpy(qkit.dequantize(qkit.quantize(array(name, w, dtype), grid)))
        assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "numpy"])
def test_an_array_of_another_framework_is_named(name):
    with pytest.raises(qkit.BackendError, match=f"backend '{name}' works on .*, not on an array of numpy"):
        qkit.quantize(np.ones((2, 64), np.float32), GRID, backend=name)


@pytest.mark.parametrize("thing", [GRID, None, 4])
@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_a_thing_that_is_no_recipe_is_named(name, thing):
    with pytest.raises(qkit.RecipeError, match="is no recipe: give a name"):
        qkit.prepare(network(name), thing)


@pytest.mark.parametrize("name", MODULE_ENGINES)
def test_a_folder_without_a_name_is_refused(name):
    with pytest.raises(qkit.ArtifactError):
        qkit.save(network(name), "/")


def test_things_that_are_no_arrays_and_no_models_are_named():
    with pytest.raises(qkit.BackendError, match=r"no backend works on builtins\.list"):
        qkit.quantize([1.0, 2.0], GRID)
    for call in (lambda x: qkit.prepare(x, RECIPE), qkit.coverage, lambda x: qkit.save(x, "never-written")):
        with pytest.raises(qkit.BackendError, match="works on arrays only"):
            call(np.ones((2, 64)))
