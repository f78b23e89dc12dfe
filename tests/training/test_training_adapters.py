"""Runs that train adapters: merged into the artifact, kept beside it, resumed to the same bytes, on masters or on codes."""

import json

import numpy as np
import pytest
from alike import contents as files
from runs import codes_of, folder, last, losses, same_run, stopping, table
from safetensors.numpy import load_file
from tables import TRAINERS as ENGINES

import qkit
from qkit import adapters, reference
from qkit.adapters import formats
from qkit.errors import UnchangedWarning
from qkit.reference import merged as arithmetic
from qkit.report.master_weights import model_of_checkpoint, newest_checkpoint
from qkit.training import run_from_table, train_model
from qkit.training.folder import LOG, read_log, run_folder_of

pytestmark = pytest.mark.skipif(not ENGINES, reason="needs an engine that trains")
LORA = {"rank": 4, "match": "*.mlp.*", "seed": 3}
KINDS = [LORA, {**LORA, "kind": "dora", "alpha": 4}]
FAST = {"learning_rate": 1e-2}


def train(path, **changes):
    return train_model(run_from_table(table(path, **{"adapter": LORA, **FAST, **changes})))


def quantized(path, name, recipe="int4-g32"):
    """An artifact of the model in `path`, which was not trained."""
    qkit.save(qkit.convert(qkit.load(path / "model", backend=name), recipe), path / "base", source=path / "model")
    return path / "base"


def merged_codes(weights, out):
    """The codes that the reference gives base weights with the adapter beside `out`, by path."""
    found = formats.read(run_folder_of(out) / "adapter")
    merged = {path: arithmetic.merged(weights(path), update) for path, update in found.updates.items()}
    return {path: reference.quantize(w, qkit.Grid("int4", 32)).codes for path, w in merged.items()}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("adapter", KINDS)
def test_the_artifact_has_the_codes_of_the_merged_weights(tmp_path, name, adapter):
    path = folder(tmp_path)
    outcome = train(path, backend=name, steps=20, adapter=adapter)
    assert outcome.held_out_after < outcome.held_out_before
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)
    assert outcome.forward_difference == 0.0
    masters = load_file(path / "model" / "model.safetensors")
    merged = merged_codes(lambda layer: masters[f"{layer}.weight"], path / "out")
    codes, before = codes_of(path / "out"), codes_of(quantized(path, name))
    assert len(merged) == 6
    for layer in codes:
        assert (codes[layer] == merged.get(layer, before[layer])).all(), layer
        assert (codes[layer] != before[layer]).any() == (layer in merged)


@pytest.mark.parametrize("name", ENGINES)
def test_a_base_of_codes_stays_packed_and_only_the_adapter_trains(tmp_path, name):
    path = folder(tmp_path)
    base = quantized(path, name)
    outcome = train(path, backend=name, steps=20, model=str(base), recipe=None)
    assert outcome.held_out_after < outcome.held_out_before
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)
    assert outcome.forward_difference == 0.0
    state = load_file(last(path / "out"))
    assert not any(key.endswith("up_proj.weight") for key in state)
    assert all("lora" in key or key.endswith("norm.weight") for key in state if key.startswith("first_moment"))
    before = load_file(base / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(state[f"weights.{key}"], before[key])
    assert (state["weights.model.norm.weight"] != before["model.norm.weight"]).any()
    assert np.array_equal(
        load_file(path / "out/model.safetensors")["model.norm.weight"], state["weights.model.norm.weight"]
    )
    opened, engine = qkit.load(base, backend=name), qkit.backend(name)
    layers = {layer.path: layer.module for layer in engine.layers(opened)}
    values = lambda layer: arithmetic.dithered(engine.unpack(layers[layer]).map(engine.to_numpy))  # noqa: E731
    merged, codes = merged_codes(values, path / "out"), codes_of(path / "out")
    assert all((codes[layer] == merged.get(layer, old)).all() for layer, old in codes_of(base).items())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_adapter_beside_the_artifact_is_opened_on_its_base(tmp_path, name, packed):
    path = folder(tmp_path)
    base = quantized(path, name, "int3-g32") if packed else path / "model"
    train(path, backend=name, model=str(base), recipe=None if packed else "int4-g32")
    kept = run_folder_of(path / "out") / "adapter"
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model = qkit.load(base, backend=name)
    model = qkit.merge(adapters.load(model if packed else qkit.prepare(model, "int4-g32"), kept))
    qkit.save(model if packed else qkit.convert(model), path / "again", source=base)
    assert (path / "again/model.safetensors").read_bytes() == (path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_with_adapters_that_is_resumed_is_the_uninterrupted_one(tmp_path, name, packed):
    path = folder(tmp_path)
    run = {"backend": name, "adapter": KINDS[1], **FAST}
    if packed:
        run |= {"model": str(quantized(path, name)), "recipe": None}
    train(path, **run, out=str(path / "whole"))
    with stopping(5) as tell:
        train_model(run_from_table(table(path, **run)), tell=tell)
    train(path, **run)
    assert same_run(path / "out", path / "whole")
    assert files(run_folder_of(path / "out") / "adapter") == files(run_folder_of(path / "whole") / "adapter")
    assert len(losses(path / "out")) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {**LORA, "rank": 2}}, r"is of a run with adapter = .*'rank': 4.* and now it is .*'rank': 2"),
        ({"adapter": None}, r"is of a run with adapter = .*, and now it is None"),
        ({"backend": ENGINES[-1]}, rf"has adapters of backend {ENGINES[0]}, and this is {ENGINES[-1]}"),
    ],
)
def test_a_resume_with_another_adapter_or_engine_is_refused(tmp_path, changes, message):
    if changes.get("backend") == ENGINES[0]:
        pytest.skip("needs two engines")
    path = folder(tmp_path)
    with stopping(5) as tell:
        train_model(run_from_table(table(path, adapter=LORA)), tell=tell)
    with pytest.raises(qkit.RunError, match=message):
        train_model(run_from_table(table(path, **{"adapter": LORA, **changes})))


def test_the_masters_under_an_adapter_are_not_taken_for_trained_ones(tmp_path):
    path = folder(tmp_path)
    train(path, steps=2)
    assert newest_checkpoint(path / "out") is None
    with pytest.raises(qkit.ArtifactError, match="holds adapters, and master weights that were not trained"):
        model_of_checkpoint(qkit.backend(ENGINES[0]), last(path / "out"), {})


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_on_codes_trains_beside_them_and_then_on_the_grid_at_its_own_rate(tmp_path, name):
    path = folder(tmp_path)
    base = str(quantized(path, name))
    run = {"schedule": "constant", "warmup": 0, "steps": 8, "evaluate_every": 1, "learning_rate": 1e-3}
    outcome = train(path, backend=name, model=base, recipe=None, adapter={**LORA, "beside": 0.5, "factor": 3}, **run)
    events = read_log(run_folder_of(path / "out") / LOG)
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates == pytest.approx([1e-3] * 4 + [3e-3] * 4, rel=1e-12)
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)


@pytest.mark.parametrize("beside", [-0.1, 1, "half"])
def test_a_share_beside_the_base_is_refused_by_name(beside):
    with pytest.raises(qkit.QkitError, match=r"adapter beside is .* give a share of the steps"):
        qkit.Adapter(beside=beside)


def test_adapters_have_a_default_rate_of_their_own(tmp_path):
    plain = {"model": "m", "out": "o", "data": ["d"]}
    assert run_from_table(plain).learning_rate == 1e-5
    assert run_from_table({**plain, "adapter": {"rank": 4}}).learning_rate == 2e-4
    assert run_from_table({**plain, "adapter": {"rank": 4}, "learning_rate": 3e-3}).learning_rate == 3e-3


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_of_adapters_that_changes_no_code_warns(tmp_path, name):
    path = folder(tmp_path)
    base = str(quantized(path, name))
    with pytest.warns(UnchangedWarning, match="training changed no code of 6 layers"):
        train(path, backend=name, model=base, recipe=None, learning_rate=1e-12, steps=2)
