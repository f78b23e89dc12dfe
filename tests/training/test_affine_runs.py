"""QLoRA on models that mlx-lm quantized: `qkit train` with an adapter, on the directory itself or on its artifact."""

import numpy as np
import pytest
from models import make
from runs import TEXT, stopping, table
from tables import TRAINERS as ENGINES

import qkit
from qkit.exchange.diff import compare
from qkit.exchange.export_model import export_mlx
from qkit.exchange.import_model import read_model, to_artifact
from qkit.training import run_from_table, train_model
from qkit.training.folder import run_folder_of

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")


def run_of(path, *, imported, scales="learned", **changes):
    mlx_lm.convert(str(make(path / "float", "llama")), str(path / "model"), quantize=True, q_bits=4)
    (path / "text.txt").write_text(TEXT)
    if imported:
        to_artifact(read_model(path / "model"), path / "artifact")
        changes |= {"model": str(path / "artifact")}
    adapter = {"rank": 4, "match": "*_proj", "seed": 3, "scales": scales}
    return run_from_table(table(path, recipe=None, adapter=adapter, learning_rate=1e-2, steps=20, **changes))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("imported", "scales"), [(False, "learned"), (True, "learned"), (True, "stored")])
def test_a_run_trains_adapters_and_scales_and_merges_into_codes(tmp_path, name, imported, scales):
    outcome = train_model(run_of(tmp_path, imported=imported, scales=scales, backend=name))
    assert outcome.held_out_after < outcome.held_out_before
    assert outcome.held_out_saved == pytest.approx(outcome.held_out_after, rel=1e-6)
    assert outcome.forward_difference == 0.0
    base, made = read_model(tmp_path / "model"), read_model(tmp_path / "out")
    rows = {row.name: row for row in compare(base, made)}
    assert sum(row.codes for row in rows.values())
    assert any(row.scales for row in rows.values()) == (scales == "learned")
    assert {name for name, row in rows.items() if row.values} == {name for name in rows if name.endswith("norm.weight")}
    if imported:  # from the files of the adapter, too
        model = qkit.load(tmp_path / "artifact", backend=name)
        again = qkit.merge(qkit.adapters.load(model, run_folder_of(tmp_path / "out") / "adapter"))
        qkit.save(again, tmp_path / "again", source=tmp_path / "artifact")
        assert read_model(tmp_path / "again").digest() == made.digest()
    export_mlx(made, tmp_path / "exported")
    theirs, _ = mlx_lm.load(str(tmp_path / "exported"))
    tokens = np.frombuffer(TEXT.encode()[:33], np.uint8).astype(np.int32)[None]
    opened = qkit.load(tmp_path / "out", backend="mlx")
    ours = qkit.backend("mlx").logits(opened, tokens)
    assert np.abs(np.array(theirs(mx.array(tokens))) - ours).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_learns_scales_and_is_resumed_is_the_uninterrupted_one(tmp_path, name):
    for place in ("whole", "halves"):
        (tmp_path / place).mkdir()
    whole = run_of(tmp_path / "whole", imported=True, backend=name, checkpoint_every=3)
    train_model(whole)
    halves = run_of(tmp_path / "halves", imported=True, backend=name, checkpoint_every=3)
    with stopping(9) as tell:
        train_model(halves, tell=tell)
    train_model(halves)
    assert read_model(whole.out).digest() == read_model(halves.out).digest()


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_without_an_adapter_is_told_why_such_a_grid_cannot_be_trained(tmp_path, name):
    run = run_of(tmp_path, imported=True, backend=name)
    with pytest.raises(qkit.GridError, match="int4-g64-affine is a read grid"):
        train_model(run_from_table({**table(tmp_path, recipe=None, backend=name), "model": str(run.model)}))
