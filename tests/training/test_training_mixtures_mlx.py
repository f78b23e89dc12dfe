"""Mixtures of experts train on MLX: they resume to the same bytes, and adapters beside the experts merge without loss."""

import numpy as np
import pytest
from models import make
from runs import LENGTH, TEXT, TOKENS, check_resumed, codes_of, table

import qkit

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

BE = qkit.backend("mlx")
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def settings(path, family, **changes):
    make(path / "model", family)
    (path / "text.txt").write_text(TEXT)
    return {**table(path, backend="mlx", steps=4, checkpoint_every=2, length=LENGTH), **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumes_to_the_same_bytes_and_its_output_has_quantized_experts(family, tmp_path):
    run = settings(tmp_path, family)
    check_resumed(run, tmp_path, stop=2)
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend="mlx")).rows
    assert next(row.weight for row in rows if row.kind == "experts") == "int4-g32-signed"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_beside_experts_merge_without_loss(family, tmp_path):
    model = qkit.prepare(qkit.load(make(tmp_path / "model", family), backend="mlx"), "int4-g32")
    adapted = qkit.adapt(model, qkit.Adapter(rank=4, match=("*.q_proj", "*.q_a_proj", "*.o_proj"), seed=3))
    before = BE.logits(adapted, TOKENS[:, :-1])
    for layer in BE.layers(adapted):
        if layer.adapter:
            layer.module.lora_b = layer.module.lora_b + 0.02
    trained = BE.logits(adapted, TOKENS[:, :-1])
    assert not np.array_equal(trained, before)
    merged = qkit.merge(adapted)
    assert np.array_equal(BE.logits(merged, TOKENS[:, :-1]), trained)
    assert np.array_equal(BE.logits(qkit.convert(merged), TOKENS[:, :-1]), trained)


@pytest.mark.parametrize("quantized", [False, True], ids=["prepared", "from codes"])
def test_a_run_with_adapters_on_kv_b_proj_resumes_and_deploys_without_a_gap(quantized, tmp_path):
    run = settings(tmp_path, "deepseek_v3", steps=6, checkpoint_every=3, learning_rate=2e-2)
    qkit.save(qkit.convert(qkit.load(tmp_path / "model", backend="mlx"), "int4-g32"), tmp_path / "codes")
    run["adapter"] = {"rank": 4, "match": ["*.kv_b_proj"]}
    if quantized:
        run = {**run, "model": str(tmp_path / "codes")}
        del run["recipe"]
    check_resumed(run, tmp_path, stop=3)
    before, after = codes_of(tmp_path / "codes"), codes_of(tmp_path / "out")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved
    assert all(path.endswith("kv_b_proj") for path in moved)
    one, other = (qkit.load(tmp_path / name, backend="mlx") for name in ("out", "whole"))
    assert np.array_equal(BE.logits(one, TOKENS), BE.logits(other, TOKENS))
