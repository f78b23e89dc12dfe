"""Adapters on codes: the base is spread within its cells, so that small updates reach the codes; and is first left as it is."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from models import build
from tables import BUILDERS as ENGINES

import qkit
from qkit import reference
from qkit.adapters import Adapter
from qkit.adapters.surgery import base_weights, put
from qkit.reference import merged as arithmetic
from qkit.testing.hard_tensors import all_grids

PACKAGES = {"torchao": "qkit_torchao", "mlx": "qkit_mlx"}
#: Grids whose scales the values on them have again, one of each kind.
STEADY = [
    *("int2-g32-signed", "int4-g32-signed", "int8-row-absmax", "int4-tensor-signed"),
    *("e2m1-g32-even", "e4m3-row-even", "e2m1-g16-nvfp4"),
]
known_engines = pytest.mark.parametrize("name", [name for name in ENGINES if name in PACKAGES])


def quantized_on(grid):
    """A weight on a grid, with a row of zeros, as a `QTensor` of the law."""
    w = np.random.default_rng(5).standard_normal((48, 512)).astype(np.float32)
    w[1] = 0
    return reference.quantize(w, grid)


def adapted(name, recipe="int4-g64"):
    """A Llama of codes with adapters that nobody trained, and its engine."""
    engine, model = qkit.backend(name), build(name)
    model = qkit.adapt(qkit.convert(model, recipe), Adapter(rank=4, alpha=10.0))
    random = np.random.default_rng(2)
    updates = {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}
    for path, one in updates.items():
        updates[path] = replace(one, b=(random.standard_normal(one.b.shape) * 0.05).astype(np.float32))
    return engine, put(engine, qkit.merge(model), updates)


@pytest.mark.parametrize("grid", [grid for grid in all_grids() if str(grid) in STEADY], ids=str)
def test_spread_values_stay_in_their_cells(grid):
    q = quantized_on(grid)
    moved = arithmetic.dithered(q)
    again = reference.quantize(moved, grid)
    assert np.array_equal(again.scales, q.scales)
    assert np.array_equal(reference.dequantize(again), reference.dequantize(q))
    assert (moved != reference.dequantize(q)).mean() > 0.3


@known_engines
@pytest.mark.parametrize("grid", [grid for grid in all_grids() if not grid.read and grid.group != 64], ids=str)
def test_every_engine_spreads_values_as_the_law(name, grid):
    engine, q = qkit.backend(name), quantized_on(grid)
    spread = import_module(f"{PACKAGES[name]}.arithmetic.merged").dithered(q.map(engine.from_numpy))
    assert np.array_equal(engine.to_numpy(spread), arithmetic.dithered(q))


def test_a_small_update_moves_a_share_of_the_codes_as_large_as_itself():
    grid = qkit.Grid("int4", 32)
    q = quantized_on(grid)
    codes = q.codes.reshape(48, -1, 32)
    inner = (np.abs(codes) < np.abs(codes).max(axis=-1, keepdims=True)).reshape(
        q.shape
    )  # the outermost choose the scale
    tenth = 0.1 * np.abs(np.repeat(q.scales, 32, axis=-1)) * inner
    moved = [
        (reference.quantize(base + tenth, grid).codes != q.codes)[inner].mean()
        for base in (reference.dequantize(q), arithmetic.dithered(q))
    ]
    assert moved[0] == 0
    assert moved[1] == pytest.approx(0.1, abs=0.01)


@known_engines
def test_adapters_on_codes_can_train_beside_the_decoded_base(name):
    engine, model = adapted(name)
    layer = next(layer for layer in engine.layers(model) if layer.adapter)
    x = np.random.default_rng(1).standard_normal((3, layer.shape[1])).astype(np.float32)
    on = engine.to_numpy(layer.module(engine.from_numpy(x)))
    engine.switch_mode(layer.module, "off")
    assert next(one for one in engine.layers(model) if one.path == layer.path).mode == "off"
    beside = engine.to_numpy(layer.module(engine.from_numpy(x)))
    merged = arithmetic.merged(next(base_weights(engine, layer, "weight")), engine.adapter_update(layer.module))
    np.testing.assert_allclose(beside, x @ merged.T, rtol=0, atol=1e-5)  # sums of float32 in another order
    engine.switch_mode(layer.module, "on")
    assert np.array_equal(engine.to_numpy(layer.module(engine.from_numpy(x))), on)
    assert not np.allclose(on, beside)


@known_engines
def test_a_model_that_trains_beside_its_base_merges_onto_the_grid(name):
    engine, model = adapted(name)
    want = {layer.path: engine.merge_adapter(layer.module) for layer in engine.layers(model) if layer.adapter}
    for layer in engine.layers(model):
        if layer.adapter:
            engine.switch_mode(layer.module, "off")
    for path, layer in {layer.path: layer for layer in engine.layers(qkit.merge(model))}.items():
        if path in want:
            codes = [engine.to_numpy(engine.unpack(module).codes) for module in (want[path], layer.module)]
            assert np.array_equal(*codes)


@known_engines
def test_files_say_that_values_were_spread(tmp_path, name):
    engine, model = adapted(name)
    qkit.adapters.save(model, tmp_path / "adapter")
    opened = qkit.adapters.load(qkit.convert(build(name), "int4-g64"), tmp_path / "adapter")
    assert all(engine.adapter_update(layer.module).dithered for layer in engine.layers(opened) if layer.adapter)
    want, got = ({layer.path: layer for layer in engine.layers(qkit.merge(one))} for one in (model, opened))
    for path, layer in want.items():
        if layer.stage == "converted":
            codes = [engine.to_numpy(engine.unpack(one.module).codes) for one in (layer, got[path])]
            assert np.array_equal(*codes)
