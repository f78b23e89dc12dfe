"""Mixtures of experts train on torch: they resume to the same bytes, and their output has quantized experts."""

import pytest
from models import make
from runs import LENGTH, TEXT, check_resumed, table

import qkit

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_run_resumes_to_the_same_bytes_and_its_output_has_quantized_experts(family, tmp_path):
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(TEXT)
    run = table(tmp_path, backend="torchao", steps=4, checkpoint_every=2, length=LENGTH)
    check_resumed(run, tmp_path, stop=2)
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend="torchao")).rows
    assert next(row.weight for row in rows if row.kind == "experts") == "int4-g32-signed"
