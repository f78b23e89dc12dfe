"""Outputs whose experts transformers would misread: it is stopped by name, and qkit opens them."""

import json

import numpy as np
import pytest
from models import TOKENS, make

import qkit
from qkit.artifact.transformers_experts import STOPPER
from qkit.exchange.import_model import read_model, to_artifact
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytest.importorskip("torch")

FLOAT_EXPERTS = qkit.Recipe("float experts", (qkit.Rule(("lm_head",)), qkit.Rule(("*",), weight=qkit.Grid("int4", 32))))
CASES = [
    ("gpt_oss", "int4-g32", "leaves them at random"),
    ("mixtral", "nvfp4-a16", "without the scale of the tensor"),
    ("qwen3_moe", FLOAT_EXPERTS, "drops float experts"),
]


def quantized(folder, family, recipe):
    plan = make_plan(make(folder / "float", family), qkit.recipe(recipe) if isinstance(recipe, str) else recipe)
    quantize_directory(plan, folder / "out", engine=qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    return plan, folder / "out"


@pytest.mark.parametrize(("family", "recipe", "reason"), CASES, ids=lambda one: str(one)[:12])
def test_transformers_is_stopped_by_name_and_plan_warns(family, recipe, reason, tmp_path):
    plan, out = quantized(tmp_path, family, recipe)
    assert {one.reader for one in plan.caveats if reason in one.text} == {"transformers", "transformers, dequantized"}
    for asked in ({}, {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}):
        with pytest.raises(ValueError, match=r"transformers misreads its experts: use qkit\.load"):
            transformers.AutoModelForCausalLM.from_pretrained(out, **asked)


@pytest.mark.parametrize(("family", "recipe", "reason"), CASES, ids=lambda one: str(one)[:12])
def test_qkit_opens_and_rewrites_such_an_output(family, recipe, reason, tmp_path):
    engine = qkit.backend("torchao")
    _, out = quantized(tmp_path, family, recipe)
    model = qkit.load(out, backend="torchao")
    logits = engine.logits(model, TOKENS)
    assert np.isfinite(logits).all()
    to_artifact(read_model(out), tmp_path / "again")
    assert np.array_equal(engine.logits(qkit.load(tmp_path / "again", backend="torchao"), TOKENS), logits)
    stopped = [json.loads((one / "config.json").read_text()) for one in (out, tmp_path / "again")]
    assert all(isinstance(one["quantization_config"][STOPPER], str) for one in stopped)


def test_transformers_opens_other_mixtures_as_before(tmp_path):
    _, out = quantized(tmp_path, "mixtral", "int4-g32")
    assert json.loads((out / "config.json").read_text())["quantization_config"][STOPPER] is None
