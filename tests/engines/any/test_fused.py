"""Layers that servers fuse share one tensor scale: in training, conversion, files, and on every engine."""

import copy
import dataclasses

import numpy as np
import pytest
from models import build, logits
from safetensors import safe_open

import qkit
from qkit import fused, reference
from qkit.adapters.surgery import base_weights, put
from qkit.reference.merged import merged as law_of_merged
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

ENGINES = [status.name for status in qkit.backends() if status.ready and status.name != "numpy"]
NVFP4 = qkit.Grid("e2m1", 16, "nvfp4")
#: Factors that set the magnitudes of fused weights apart: with the shared scale, blocks of k have scales below the normal e4m3.
FACTORS = {"k_proj": 2.0**-19, "v_proj": 3.7, "up_proj": 0.11}


def apart(name):
    """The tests' Llama on engine `name`, with fused weights of different magnitudes."""
    engine, model = qkit.backend(name), build(name)
    tensors = {key: engine.to_numpy(tensor) for key, tensor in engine.tensors(model).items()}
    for key in tensors:
        tensors[key] = tensors[key] * np.float32(FACTORS.get(key.split(".")[-2], 1))
    engine.fill(model, tensors)
    return model


def codes(name, model):
    """The NumPy codes of every layer of a converted model, by path."""
    engine = qkit.backend(name)
    return {
        layer.path: engine.unpack(layer.module).map(engine.to_numpy)
        for layer in engine.layers(model)
        if layer.stage == "converted"
    }


@pytest.fixture(scope="module")
def law():
    """Codes by the law: each weight with the largest magnitude of all weights that it is fused with."""
    engine, model = qkit.backend(ENGINES[0]), apart(ENGINES[0])
    weights = {
        layer.path: engine.to_numpy(engine.weight(layer.module))
        for layer in engine.layers(model)
        if layer.kind == "linear" and layer.path != "lm_head"
    }
    peaks = {path: float(abs(w).max()) for path, w in weights.items()}
    for group in fused.groups(weights):
        peaks |= dict.fromkeys(group, max(peaks[path] for path in group))
    return {path: reference.quantize(w, NVFP4, peak=peaks[path]) for path, w in weights.items()}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("how", ["converted", "prepared", "trained", "copied"])
def test_codes_are_those_of_the_law_and_evaluation_has_their_values(name, how, law):
    model = apart(name)
    if how != "converted":
        model = qkit.prepare(model, "nvfp4-a16")
        engine = qkit.backend(name)
        if how == "trained":  # a weight that moves alone moves the scale of the others
            before = logits(name, model)
            tensors = {key: engine.to_numpy(tensor).copy() for key, tensor in engine.tensors(model).items()}
            engine.fill(model, {key: w * np.float32(64 if "v_proj" in key else 1) for key, w in tensors.items()})
            assert (logits(name, model) != before).any()
            engine.fill(model, tensors)
        if how == "copied":
            model = copy.deepcopy(model)
        there = logits(name, model)
        model = qkit.convert(model)
        assert (logits(name, model) == there).all()
    else:
        model = qkit.convert(model, "nvfp4-a16")
    found = codes(name, model)
    assert found.keys() == law.keys()
    for path, q in found.items():
        assert all((part == q.parts()[key]).all() for key, part in law[path].parts().items()), path
    assert (
        found["model.layers.0.self_attn.k_proj"].tensor_scale == found["model.layers.0.self_attn.v_proj"].tensor_scale
    )


@pytest.mark.parametrize("name", ENGINES)
def test_the_streamed_directory_has_the_bytes_of_the_saved_one(name, tmp_path):
    model = apart(name)
    qkit.save(qkit.convert(model, "nvfp4-a16"), tmp_path / "saved")
    again = qkit.load(tmp_path / "saved", backend=name)
    assert (logits(name, again) == logits(name, model)).all()
    float_model = tmp_path / "float"
    qkit.save(apart(name), float_model)
    plan = make_plan(float_model, qkit.recipe("nvfp4-a16"))
    out = quantize_directory(plan, tmp_path / "streamed", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "saved", out)]
    assert files[0] == files[1]
    with safe_open(out / "model.safetensors", "numpy") as file:
        scales = {key: file.get_tensor(key).item() for key in file.keys() if "global" in key}  # noqa: SIM118
    for group in fused.groups(key.removesuffix(".weight_global_scale") for key in scales):
        assert len({scales[f"{path}.weight_global_scale"] for path in group}) == 1


def test_a_shared_scale_is_that_of_the_rows_of_one_tensor():
    """The law in other words: fused weights are quantized as the rows of one tensor are."""
    random = np.random.default_rng(3)
    parts = [random.standard_normal((4, 64)).astype(np.float32) * np.float32(f) for f in (1, 2.0**-12, 37)]
    whole = reference.quantize(np.concatenate(parts), NVFP4)
    peak = float(max(abs(part).max() for part in parts))
    for i, part in enumerate(parts):
        q, rows = reference.quantize(part, NVFP4, peak=peak), slice(4 * i, 4 * i + 4)
        assert (q.codes == whole.codes[rows]).all()
        assert (q.scales == whole.scales[rows]).all()
        assert q.tensor_scale == whole.tensor_scale
        assert (reference.fake_quantize(part, NVFP4, peak=peak) == reference.dequantize(q)).all()


def test_a_weight_that_is_not_finite_spoils_those_that_share_its_scale():
    w = np.ones((2, 16), np.float32)
    assert np.isnan(reference.fake_quantize(w, NVFP4, peak=float("nan"))).all()


@pytest.mark.skipif("torchao" not in ENGINES, reason="torch's compiler")
@pytest.mark.parametrize("ste", ["identity", "masked"])
def test_compiled_training_has_the_steps_of_eager_training(ste):
    import torch

    rule = dataclasses.replace(qkit.recipe("nvfp4-a16").rules[-1], ste=ste)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
                torch.manual_seed(number)
                layer = torch.nn.Linear(64, 64, bias=False)
                layer.weight.data *= 2.0 ** (-9 * number)
                setattr(self, name, layer)

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    x, trained = torch.randn(8, 64), []
    for compiled in (False, True):
        model = qkit.prepare(Attention(), qkit.Recipe("shared", (rule,)))
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            loss = run(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append([*model.parameters(), run(x)])
        assert torch.allclose(run(x), qkit.convert(copy.deepcopy(model))(x), atol=1e-6)  # products in another order
    for eager, compiled in zip(*trained, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-6)  # inductor fuses the loss, and rounds its sum elsewhere


@pytest.mark.parametrize("base", ["prepared", "converted"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ENGINES)
def test_adapters_share_the_scale_of_the_merged_weights(name, kind, base):
    """With an adapter, merged, converted: the same logits; the codes are the law's, with the peak of all merged weights."""
    engine, model = qkit.backend(name), apart(name)
    verb = qkit.prepare if base == "prepared" else qkit.convert
    model = qkit.adapt(verb(model, "nvfp4-a16"), qkit.Adapter(rank=4, kind=kind))
    random, merged = np.random.default_rng(5), {}
    updates = {layer.path: engine.adapter_update(layer.module) for layer in engine.layers(model) if layer.adapter}
    for path, one in updates.items():  # the query's own weight is small beside its update, which so sets the scale
        size = 40.0 if path.endswith("q_proj") else 0.01
        b = (random.standard_normal(one.b.shape) * size).astype(np.float32)
        updates[path] = dataclasses.replace(
            one, b=b, magnitude=None if kind == "lora" else one.magnitude * np.float32(9)
        )
    model = put(engine, qkit.merge(model), updates)
    for layer in engine.layers(model):
        if layer.adapter:
            merged[layer.path] = law_of_merged(
                next(base_weights(engine, layer, "weight", spread=layer.stage == "converted")),
                engine.adapter_update(layer.module),
            )
    adapted = logits(name, model)
    model = qkit.merge(model)
    assert (logits(name, model) == adapted).all()
    if base == "prepared":
        model = qkit.convert(model)
        assert (logits(name, model) == adapted).all()
    peaks = {path: float(abs(w).max()) for path, w in merged.items()}
    for group in fused.groups(merged):
        peaks |= dict.fromkeys(group, max(peaks[path] for path in group))
    found = codes(name, model)
    assert found.keys() == merged.keys()
    alone = [
        path for path, w in merged.items() if reference.quantize(w, NVFP4).tensor_scale != found[path].tensor_scale
    ]
    assert alone, "scales of their own would be the same"
    for path, w in merged.items():
        want = reference.quantize(w, NVFP4, peak=peaks[path])
        assert all((part == found[path].parts()[key]).all() for key, part in want.parts().items()), path


@pytest.mark.parametrize("name", ENGINES)
def test_an_adapter_on_one_of_the_converted_layers_that_share_a_scale_is_refused(name):
    model = qkit.convert(build(name), "nvfp4-a16")
    with pytest.raises(
        qkit.StageError, match=r"q_proj cannot take an adapter alone: .* with \S+k_proj, \S+v_proj, which"
    ):
        qkit.adapt(model, qkit.Adapter(match=("*.q_proj", "*.o_proj")))
    qkit.adapt(model, qkit.Adapter(match=("*.[qkv]_proj", "*.down_proj")))
    qkit.adapt(qkit.prepare(build(name), "nvfp4-a16"), qkit.Adapter(match=("*.q_proj",)))
