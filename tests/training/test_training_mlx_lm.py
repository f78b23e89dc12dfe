"""mlx-lm's own training loop on a prepared model."""

import numpy as np
import pytest
from alike import same
from models import small
from runs import TOKENS, arrays

import qkit

optim = pytest.importorskip("mlx.optimizers")
trainer = pytest.importorskip("mlx_lm.tuner.trainer")


def tuned(model, tmp_path, **options):
    data = [(row.tolist(), 0) for row in TOKENS]
    arguments = trainer.TrainingArgs(
        batch_size=2, iters=6, steps_per_report=3, adapter_file=str(tmp_path / "adapters.safetensors"), **options
    )
    dataset = trainer.CacheDataset(Rows(data))
    trainer.train(model, optim.Adam(learning_rate=1e-2), dataset, args=arguments)
    return arrays("mlx", model)


class Rows(list):
    """A data set as mlx-lm has them: rows, and a function that turns a row into tokens."""

    def process(self, row):
        return row


@pytest.mark.parametrize("recompute", [False, True])
def test_a_prepared_model_trains_on_its_grid_in_mlx_lm(tmp_path, monkeypatch, recompute):
    block = type(small("mlx").layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # the loop patches the class to recompute, and leaves it so
    np.random.seed(0)  # the loop draws its order from there
    start = arrays("mlx", small("mlx"))
    model = qkit.prepare(small("mlx"), "int4-g32")
    first = tuned(model, tmp_path, grad_checkpoint=recompute)
    assert not same(first, start)
    np.random.seed(0)
    assert not same(first, tuned(small("mlx"), tmp_path, grad_checkpoint=recompute))
    want = qkit.backend("mlx").logits(model, TOKENS)
    assert np.array_equal(qkit.backend("mlx").logits(qkit.convert(model), TOKENS), want)
