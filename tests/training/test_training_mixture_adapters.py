"""Adapters on experts in whole runs: resumed to the same bytes, merged and reloaded without a gap, on every engine."""

import numpy as np
import pytest
from models import make
from runs import LENGTH, TEXT, check_resumed, codes_of, table
from tables import MODULES

import qkit

pytest.importorskip("transformers")

ENGINES = [name for name in ("torchao", "mlx") if name in MODULES]
TOKENS = np.random.default_rng(5).integers(0, 256, (2, 20)).astype(np.int32)


@pytest.mark.parametrize("quantized", [False, True], ids=["prepared", "from codes"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("backend", ENGINES)
def test_a_run_with_adapters_on_experts_resumes_and_deploys_without_a_gap(backend, family, quantized, tmp_path):
    engine = qkit.backend(backend)
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(TEXT)
    model = qkit.convert(qkit.load(tmp_path / "model", backend=backend), "int4-g32")
    qkit.save(model, tmp_path / "codes")
    run = table(tmp_path, backend=backend, steps=6, checkpoint_every=3, length=LENGTH, learning_rate=2e-2)
    run["adapter"] = {"rank": 4, "match": ["*.experts"]}
    if quantized:
        run = {**run, "model": str(tmp_path / "codes")}
        del run["recipe"]
    check_resumed(run, tmp_path, stop=3)
    one = qkit.load(tmp_path / "out", backend=backend)
    before, after = codes_of(tmp_path / "codes"), codes_of(tmp_path / "out")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert all(".experts." in path for path in moved)
    assert len(moved) >= 12  # every projection of every expert of a block
    other = qkit.load(tmp_path / "whole", backend=backend)
    assert np.array_equal(engine.logits(one, TOKENS), engine.logits(other, TOKENS))
