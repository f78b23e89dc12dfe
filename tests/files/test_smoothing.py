"""Smoothed models have the function of the model, and lose less where inputs are quantized."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import qkit
from qkit.calibration import calibrate
from qkit.cli.application import application
from qkit.errors import ArtifactError, PlanError, RangeError
from qkit.fitting.statistics import open_statistics
from qkit.smoothing import smooth, summary

pytestmark = pytest.mark.filterwarnings("ignore::qkit.errors.FewTokensWarning")

TOKENS = np.random.default_rng(3).integers(0, 200, (8, 96)).astype(np.int32)
EXACT = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "phi3",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")  # whose routers read a norm, too
ROUNDED = ("gemma", "gemma2", "gemma3_text")  # 1 + w
OUTLIERS = (3, 40, 77)


def rough(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model whose norms and biases are no ones and zeros, with some large inputs, as trained models have them."""
    torch.manual_seed(0)
    common = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    others = {
        "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 128},
        "granite": wide | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
        "phi3": wide,
    }
    if family in others:
        config = AutoConfig.for_model(family, **common, **others[family])
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(make(folder.with_name("plain"), family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith(("norm.weight", "layernorm.weight", "layer_norm.weight")) and parameter.shape[0] >= 128:
                parameter[list(OUTLIERS)] = 40.0
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter[:, list(OUTLIERS)] /= 40
            if name.endswith(("qkv_proj.weight", "gate_up_proj.weight", "query_key_value.weight", "h_to_4h.weight")):
                parameter[:, list(OUTLIERS)] /= 40
    model.to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS[:2]).long()).logits


def smoothed(model: Path, out: Path) -> Path:
    stats = calibrate(model, out.with_name("stats"), TOKENS, engine=qkit.backend("torchao"))
    found = smooth(model, out, open_statistics(stats), strength=0.5)
    spans = [high / low for low, high in summary(found).values()]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert len(spans) == config["num_hidden_layers"] * (1 if config["model_type"] in MIXTURES else 2)
    assert min(spans) >= 16  # the large inputs are divided by more
    return out


@pytest.mark.parametrize("family", EXACT + ROUNDED)
def test_the_function_stays(family: str, tmp_path: Path) -> None:
    model = rough(tmp_path / "model", family)
    out = smoothed(model, tmp_path / "out")
    before, after = logits(model), logits(out)
    if family in EXACT:
        assert torch.equal(before, after)  # powers of two round nothing
    else:
        assert (before - after).abs().max() <= 1e-4 * before.abs().max()  # (1 + w) / s - 1 is rounded to float32


def test_bfloat16_is_not_rounded(tmp_path: Path) -> None:
    model = rough(tmp_path / "model", "llama", torch.bfloat16)
    assert torch.equal(logits(model), logits(smoothed(model, tmp_path / "out")))


def test_quantized_inputs_lose_less(tmp_path: Path) -> None:
    model = rough(tmp_path / "model", "llama")
    out, wanted, lost = smoothed(model, tmp_path / "out"), logits(model), []
    for folder in (model, out):
        converted = qkit.convert(qkit.load(folder, backend="torchao"), "int8-dynamic-act-int8-weight")
        with torch.no_grad():
            lost.append(float((converted(torch.from_numpy(TOKENS[:2]).long()).logits - wanted).square().mean()))
    assert lost[1] < lost[0] / 4


def test_wrong_models_and_strengths_are_refused(tmp_path: Path) -> None:
    model = Path(make(tmp_path / "model", "llama"))
    stats = open_statistics(calibrate(model, tmp_path / "stats", TOKENS, engine=qkit.backend("torchao")))
    odd = Path(make(tmp_path / "odd", "gpt_oss"))
    with pytest.raises(
        PlanError, match="cannot smooth a 'gpt_oss': its norms and their readers are not known; known are"
    ):
        smooth(odd, tmp_path / "out", stats, strength=0.5)
    with pytest.raises(PlanError, match="a strength of 2 is outside 0 to 1"):
        smooth(model, tmp_path / "out", stats, strength=2)
    with pytest.raises(ArtifactError, match="is the model itself"):
        smooth(model, model, stats, strength=0.5)
    assert not (tmp_path / "out").exists()


def test_wrong_statistics_are_refused(tmp_path: Path) -> None:
    other = Path(make(tmp_path / "other", "llama"))
    engine, recipe = qkit.backend("torchao"), qkit.recipe("int8-dynamic-act-int8-weight")
    stats = open_statistics(calibrate(other, tmp_path / "stats", TOKENS, engine=engine, recipe=recipe))
    with pytest.raises(PlanError, match="statistics are of quantized inputs"):
        smooth(other, tmp_path / "out", stats, strength=0.5)
    narrow = Path(make(tmp_path / "narrow", "llama", intermediate_size=128))
    with pytest.raises(ArtifactError, match="has statistics of another model"):
        smooth(narrow, tmp_path / "out", stats, strength=0.5)


def test_numbers_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    gemma = rough(tmp_path / "gemma", "gemma", torch.bfloat16)
    stats = open_statistics(calibrate(gemma, tmp_path / "stats", TOKENS, engine=qkit.backend("torchao")))
    with pytest.raises(PlanError, match="its weight is added to 1, and would be rounded in BF16"):
        smooth(gemma, tmp_path / "out", stats, strength=0.5)
    half = rough(tmp_path / "half", "llama", torch.float16)  # small weights have few bits of float16 left
    own = open_statistics(calibrate(half, tmp_path / "own", TOKENS, engine=qkit.backend("torchao")))
    with pytest.raises(RangeError, match="out of the range of float16: smooth in float32"):
        smooth(half, tmp_path / "out", own, strength=1)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_many_norms(tmp_path: Path) -> None:
    model = rough(tmp_path / "model", "qwen2")
    stats = calibrate(model, tmp_path / "stats", TOKENS, engine=qkit.backend("torchao"))
    ran = CliRunner().invoke(application, ["smooth", str(model), str(tmp_path / "out"), "--stats", str(stats)])
    assert ran.exit_code == 0, ran.output
    assert "4 norms are smoothed, inputs divided by" in ran.output.replace("\n", " ")
    ran = CliRunner().invoke(
        application, ["quantize", str(tmp_path / "out"), str(tmp_path / "q"), "-r", "int8-dynamic-act-int8-weight"]
    )
    assert ran.exit_code == 0, ran.output
