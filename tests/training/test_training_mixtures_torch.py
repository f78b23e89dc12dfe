"""Mixtures of experts train on torch: they resume to the same bytes, and their output has quantized experts."""

import pytest
from models import make
from runs import LENGTH, TEXT, losses, same_run, stopping, table

import qkit
from qkit.training import run_from_table, train_model

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_run_resumes_to_the_same_bytes_and_its_output_has_quantized_experts(family, tmp_path):
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(TEXT)
    run = table(tmp_path, backend="torchao", steps=4, checkpoint_every=2, length=LENGTH)
    with stopping(2) as tell:
        train_model(run_from_table(run), tell=tell)
    train_model(run_from_table(run))
    train_model(run_from_table({**run, "out": str(tmp_path / "whole")}))
    assert same_run(tmp_path / "out", tmp_path / "whole")
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    rows = qkit.coverage(qkit.load(tmp_path / "out", backend="torchao")).rows
    assert next(row.weight for row in rows if row.kind == "experts") == "int4-g32-signed"
