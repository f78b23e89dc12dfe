"""The law of read grids: codes of a file are decoded as by its owner, and no rule quantizes onto them."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import qkit
from qkit import reference
from qkit.element import READ_RULES
from qkit.errors import GridError, RecipeError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference import packing, read_scales, stored
from qkit.rules import Recipe, Rule, parse_recipe
from qkit.testing.hard_tensors import random
from qkit.testing.read_tensors import read_grids, read_tensor, read_tensors

GRIDS = read_grids()
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@each_grid
def test_a_read_grid_prints_and_parses(grid):
    assert Grid.parse(str(grid)) == grid
    assert grid.read


def test_every_kind_of_read_scales_has_a_grid():
    assert {grid.scale for grid in GRIDS} == READ_RULES.keys()


@each_grid
def test_values_are_one_product_one_sum_and_one_rounding(grid):
    """In float64, where the products of this test are exact, rounded as the page says."""
    for q in read_tensors(grid):
        steps = reference.scale_values(q).astype(np.float64)
        codes = q.codes.reshape(grid.group_shape(q.shape))
        numbers = codes.astype(np.float64) if grid.element.kind == "integer" else values_of(codes, grid)
        if q.zeros is not None:
            numbers = numbers - q.zeros[..., None]
        with np.errstate(over="ignore"):
            v = (numbers * steps[..., None]).astype(np.float32)
            if q.biases is not None:
                v = (v.astype(np.float64) + q.biases.astype(np.float64)[..., None]).astype(np.float32)
            want = v.reshape(q.shape).astype(q.dtype if q.dtype != "bfloat16" else ml_dtypes.bfloat16)
        made = reference.dequantize(q)
        assert made.dtype == want.dtype
        assert np.array_equal(made, want)


def values_of(codes, grid):
    return reference.rounding.float_values(codes, grid.element).astype(np.float64)


def test_every_code_of_a_power_of_two_has_its_value():
    c = np.arange(256, dtype=np.uint8)
    made = read_scales.e8m0_values(c)
    assert np.isnan(made[255])
    assert (made[:255].astype(np.float64) == 2.0 ** (np.arange(255) - 127.0)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_affine_values_are_those_of_mlx_in_float32(bits, kind):
    mx = pytest.importorskip("mlx.core")
    w = mx.array(random((32, 256), bits)).astype(getattr(mx, kind))
    for group in (32, 64, 128):
        words, scales, biases = mx.quantize(w, group_size=group, bits=bits)
        wide = [x.astype(mx.float32) for x in (scales, biases)]
        want = np.array(mx.dequantize(words, *wide, group_size=group, bits=bits))
        codes = packing.unpack(np.array(words), bits, 256)
        q = QTensor(codes, to_numpy(scales), Grid(f"int{bits}", group, "affine"), "float32", biases=to_numpy(biases))
        assert np.array_equal(reference.dequantize(q), want)


def to_numpy(x):
    import mlx.core as mx

    return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else np.array(x)


@each_grid
def test_quantizing_its_own_values_changes_no_code(grid):
    """Where codes have different values, and steps are not lost beside a bias."""
    q = read_tensor(grid, "float32")
    clean = np.random.default_rng(5).uniform(0.5, 1.5, q.scales.shape).astype(np.float32)
    more = {"biases": -clean * 3} if grid.has_biases else {}
    if grid.stored_scales == "float":
        q = replace(q, scales=clean, **more)
    elif grid.stored_scales == "e8m0":
        q = replace(q, scales=np.full_like(q.scales, 120))
    again = stored.requantize(reference.dequantize(q), q)
    if grid.element.kind == "float":  # two codes stand for zero
        assert np.array_equal(reference.dequantize(again), reference.dequantize(q))
    else:
        assert np.array_equal(again.codes, q.codes)
    assert again.parts().keys() == q.parts().keys()


@each_grid
def test_new_codes_are_the_nearest(grid):
    q = read_tensor(grid, "float32")
    w = random(q.shape, 9) * 0.3
    values = stored.fake_requantize(w, q)
    assert np.array_equal(values, reference.dequantize(stored.requantize(w, q)))
    for step in (-1, 1):
        other = replace(q, codes=moved(stored.requantize(w, q).codes, step, grid))
        gap, mine = (np.abs(x.astype(np.float64) - w) for x in (reference.dequantize(other), values))
        slack = 1e-6 * (np.abs(w) + np.abs(values) + np.abs(biases_of(q)))  # of the roundings in fp32
        assert (mine <= gap + slack).all()


def biases_of(q):
    if q.biases is None:
        return 0
    groups = q.grid.group_shape(q.shape)
    return np.broadcast_to(q.biases.astype(np.float64)[..., None], groups).reshape(q.shape)


def moved(codes, step, grid):
    """Codes of a neighbour, where there is one of the same sign."""
    low, high = (0, grid.element.levels) if codes.dtype == np.uint8 else (grid.element.lowest, grid.element.highest)
    if grid.element.kind == "float":
        magnitude, sign = codes & (grid.element.levels >> 1), codes & ~np.uint8(grid.element.levels >> 1)
        top = {"e2m1": 7, "e4m3": 0x7E, "e5m2": 0x7B}[grid.element.name]
        return (np.clip(magnitude.astype(int) + step, 0, top).astype(np.uint8)) | sign
    return np.clip(codes.astype(int) + step, low, high).astype(codes.dtype)


def test_a_number_that_is_not_finite_spoils_itself_alone():
    q = read_tensor(Grid("int4", 32, "affine"), "float32")
    w = random(q.shape, 3)
    w[1, 5], w[2, 7] = np.nan, np.inf
    made = stored.fake_requantize(w, q)
    assert np.argwhere(np.isnan(made)).tolist() == [[1, 5], [2, 7]]


@each_grid
def test_the_mask_is_false_exactly_beyond_the_outer_codes(grid):
    q = read_tensor(grid, "float32")
    if grid.stored_scales == "float":
        q = replace(q, scales=np.abs(q.scales.astype(np.float32)) + np.float32(0.1))
    w = reference.dequantize(q)
    assert stored.unclipped(w, q).all()
    if grid.stored_scales == "float":
        assert not stored.unclipped(np.full_like(w, 1e37), replace(q, scales=np.full_like(q.scales, 0.1))).any()


def test_no_recipe_and_no_rule_of_an_activation_names_a_read_grid():
    text = (
        'schema = 1\n[grids.w]\nelement = "int4"\ngroup = 64\nscale = "affine"\n[[rules]]\nmatch = "*"\nweight = "w"\n'
    )
    with pytest.raises((RecipeError, GridError), match=r"grids\.w: int4-g64-affine is a read grid"):
        parse_recipe(text, name="mine", source="mine.toml")
    with pytest.raises(GridError, match="is a read grid"):
        Rule(("*",), weight=Grid("int4", 64), activation=Grid("int8", "row", "stored"))
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    recipe = Recipe("read", (Rule(("*",), weight=Grid("int4", 64, "affine")),))
    for function in (qkit.prepare, qkit.convert):
        with pytest.raises(GridError, match="another program wrote"):
            function(model, recipe)


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        (Grid("int4", 64, "affine"), {}),
        (Grid("int4", 64, "stored"), {"biases": np.ones((2, 1), np.float32)}),
        (Grid("int4", 64, "stored-zeros"), {}),
        (Grid("e2m1", 16, "stored-nvfp4"), {}),
        (Grid("int4", 64, "affine"), {"biases": np.ones((1, 1), np.float32)}),
    ],
)
def test_a_part_that_is_missing_or_does_not_belong_is_refused(grid, more):
    codes = np.zeros((2, 64), np.uint8)
    with pytest.raises(GridError, match=r"needs|has no|do not fit"):
        QTensor(codes, np.ones(grid.scale_shape((2, 64)), np.float32), grid, "float32", **more)


def test_read_grids_belong_to_their_elements():
    for element, group, scale in (("e4m3", 32, "affine"), ("int4", 32, "stored-e8m0"), ("e2m1", 32, "stored-nvfp4")):
        with pytest.raises(GridError, match=r"no scale rule|belong to"):
            Grid(element, group, scale)
