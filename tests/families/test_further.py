"""Layers that predict further tokens: published files have them, no model of transformers or mlx-lm does; they stay float."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")

import gate
import openings
from catalogue import HYBRID, Family, make

from qkit.artifact.further import REASON, predicts_further
from qkit.streaming.carry_out import quantize_directory
from qkit.streaming.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about small models
EXPERTS = [f"mlp.experts.{e}.{one}_proj.weight" for e in range(4) for one in ("gate", "up", "down")]
SHAPES = {"eh_proj.weight": (64, 128), "mlp.gate.weight": (4, 64), "enorm.weight": (64,)} | dict.fromkeys(
    EXPERTS, (64, 64)
)
PLACES = {
    "Glm4MoeForCausalLM": ({}, "model.layers.2", {"shared_head.head.weight": "lm_head.weight"}),
    "Qwen3NextForCausalLM": (HYBRID, "mtp.layers.0", {}),
}


@pytest.mark.parametrize("architecture", PLACES)
def test_layers_that_predict_further_tokens_stay_float_and_readers_leave_them_out(architecture, tmp_path):
    sizes, place, more = PLACES[architecture]
    stored = {f"{place}.{name}": shape for name, shape in {**SHAPES, **more}.items()}
    make(Family(architecture, sizes, stored=stored), tmp_path / "in")
    plan = make_plan(tmp_path / "in", gate.qkit.recipe("int4-g32"))
    assert {row.stored.slot.name for row in plan.rows if row.reason == REASON} == stored.keys()
    quantize_directory(plan, tmp_path / "out", engine=gate.qkit.backend("numpy"), workers=1, tick=lambda *_: None)
    wanted = openings.run(openings.dequantized(tmp_path / "out"))
    for got in (openings.run(openings.in_qkit(tmp_path / "out")), openings.in_mlx_lm(tmp_path / "out")):
        assert np.abs(got - wanted).max() <= gate.TOLERANCE["mlx-lm"] * np.abs(wanted).max()  # as the gate has it


def test_hidden_layers_that_config_json_counts_predict_the_next_token():
    inner = {"text_config": {"num_hidden_layers": 2}}
    assert not predicts_further("model.layers.1.mlp.up_proj.weight", {"num_hidden_layers": 2})
    assert predicts_further("model.layers.2.mlp.up_proj.weight", {"num_hidden_layers": 2})
    assert predicts_further("language_model.model.layers.2.enorm.weight", inner)
    assert not predicts_further("vision_tower.layers.5.mlp.weight", inner)
    assert not predicts_further("model.layers.70.mlp.up_proj.weight", {})
