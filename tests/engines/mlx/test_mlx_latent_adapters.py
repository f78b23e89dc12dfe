"""Adapters on `kv_b_proj`, which mlx-lm splits in two: they train, merge without loss, and have the codes of torch's."""

import copy

import numpy as np
import pytest
from models import make
from runs import TOKENS

import qkit
from qkit.adapters.surgery import put
from qkit.reference.merged import Update

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

MLX, TORCH = qkit.backend("mlx"), qkit.backend("torchao")
X = TOKENS[:, :-1]
ONLY = ("*.kv_b_proj",)
RECIPES = ["int4-g32", "int8-row", "nvfp4-a16", "mxfp4-a16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"), "deepseek_v3")


def opened(folder, engine, recipe, stage):
    model = qkit.load(folder, backend=engine)
    return qkit.convert(model, recipe) if stage == "converted" else qkit.prepare(model, recipe)


def own(engine, model):
    return {layer.path: layer for layer in engine.layers(model) if layer.path.endswith("kv_b_proj")}


def drawn(model, *, dora, dithered):
    """An update of each `kv_b_proj`, whose factors are far from zero."""
    found = {}
    for path, layer in own(MLX, model).items():
        random = np.random.default_rng(len(path))
        outputs, inputs = layer.shape
        a, b = (random.normal(size=shape, scale=0.1).astype(np.float32) for shape in ((4, inputs), (outputs, 4)))
        m = np.abs(random.normal(size=outputs)).astype(np.float32) if dora else None
        found[path] = Update(a, b, 2.0, m, dithered)
    return found


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("stage", ["prepared", "converted"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_merge_has_the_logits_of_the_adapters_and_the_codes_of_torch(recipe, stage, kind, folder):
    models = {engine: opened(folder, engine.name, recipe, stage) for engine in (MLX, TORCH)}
    updates = drawn(models[MLX], dora=kind == "dora", dithered=stage == "converted")
    codes = {}
    for engine, model in models.items():
        before = engine.logits(model, X)
        model = put(engine, model, updates)
        assert {layer.adapter for layer in own(engine, model).values()} == {f"{kind}, rank 4"}
        adapted = engine.logits(model, X)
        assert not np.array_equal(adapted, before)
        for path, layer in own(engine, model).items():
            again = engine.adapter_update(layer.module)
            assert np.array_equal(again.a, updates[path].a)
            assert np.array_equal(again.b, updates[path].b)
        model = qkit.merge(model)
        model = model if stage == "converted" else qkit.convert(model)
        assert np.array_equal(engine.logits(model, X), adapted)
        codes[engine] = {
            path: engine.unpack(layer.module).map(engine.to_numpy).parts() for path, layer in own(engine, model).items()
        }
    for path, parts in codes[MLX].items():
        assert {name: array.tolist() for name, array in parts.items()} == {
            name: array.tolist() for name, array in codes[TORCH][path].items()
        }


@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_gradients_are_those_of_torch_and_only_factors_train(stage, folder):
    import torch

    updates, found = None, {}
    for engine in (MLX, TORCH):
        model = opened(folder, engine.name, "int4-g32", stage)
        updates = updates or drawn(model, dora=True, dithered=stage == "converted")
        model = put(engine, model, updates).train()
        if engine is TORCH:
            model(torch.from_numpy(X).long(), labels=torch.from_numpy(X).long()).loss.backward()
            trained = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
            found[engine] = [trained[name] for name in sorted(trained)]
        else:

            def loss(model, x):
                logits = model(x).astype(mx.float32)
                return nn.losses.cross_entropy(logits[:, :-1], x[:, 1:], reduction="mean")

            _, gradients = nn.value_and_grad(model, loss)(model, mx.array(X))
            flat = dict(tree_flatten(gradients))
            assert {name.rpartition(".")[2] for name in flat} == {"lora_a", "lora_b", "m"}
            found[engine] = [np.array(flat[name]) for name in sorted(flat)]
    assert len(found[MLX]) == len(found[TORCH]) > 0
    for mine, theirs in zip(found[MLX], found[TORCH], strict=True):
        theirs = theirs.T if mine.shape != theirs.shape else theirs
        assert np.abs(mine - theirs).max() <= 2e-4 * max(np.abs(theirs).max(), 1e-6)  # sums in another order


def test_evaluation_has_the_gradients_of_training(folder):
    model = opened(folder, "mlx", "int8-row", "prepared")
    model = put(MLX, model, drawn(model, dora=False, dithered=False))

    def loss(model, x):
        return nn.losses.cross_entropy(model(x)[:, :-1], x[:, 1:], reduction="mean")

    found = [
        dict(tree_flatten(nn.value_and_grad(mode, loss)(mode, mx.array(X))[1]))
        for mode in (model.train(), model.eval())
    ]
    for name, one in found[0].items():
        assert np.abs(np.array(one - found[1][name])).max() <= 1e-4 * float(
            mx.abs(one).max()
        )  # kernels in other orders


def test_one_token_at_a_time_computes_as_all_at_once(folder):
    from mlx_lm.models.cache import make_prompt_cache

    model = opened(folder, "mlx", "int8-row", "converted")
    model = put(MLX, model, drawn(model, dora=False, dithered=True)).eval()
    cache = make_prompt_cache(model)
    parts = mx.concatenate([model(mx.array(X[:, i : i + 1]), cache=cache) for i in range(X.shape[1])], axis=1)
    want = MLX.logits(model, X)
    assert np.abs(np.array(parts) - want).max() <= 1e-4 * np.abs(want).max()  # heads multiply in another order


def test_switched_off_and_copied_models_compute_without_their_grid_and_alike(folder):
    for stage in ("prepared", "converted"):
        model = opened(folder, "mlx", "int4-g32", stage)
        model = put(MLX, model, drawn(model, dora=False, dithered=stage == "converted"))
        adapted = MLX.logits(model, X)
        assert np.array_equal(MLX.logits(copy.deepcopy(model), X), adapted)
        for mode in ("off", "on"):
            for layer in own(MLX, model).values():
                MLX.switch_mode(layer.module, mode)
            assert {layer.mode for layer in own(MLX, model).values()} == {mode}
            assert np.array_equal(MLX.logits(model, X), adapted) == (mode == "on")
