"""The work of the two processes of test_mlx_distributed.py: train on halves of a batch, with averaged gradients."""

import sys

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten

import qkit


def train(size, rank, average):
    """The weights after four steps on this process's share of each batch, as NumPy by name, and the losses."""
    mx.random.seed(0)
    model = qkit.prepare(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)), "int4-g32")
    optimizer = optimizers.AdamW(learning_rate=1e-2)
    step = nn.value_and_grad(model, lambda x, y: nn.losses.mse_loss(model(x), y))
    random = np.random.default_rng(0)
    losses = []
    for _ in range(4):
        x, y = (mx.array(random.standard_normal((8, n)).astype(np.float32)) for n in (64, 32))
        loss, gradients = step(x[rank::size], y[rank::size])
        optimizer.update(model, average(gradients))
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return {name: np.array(one) for name, one in tree_flatten(model.parameters())}, losses


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    weights, losses = train(group.size(), group.rank(), nn.average_gradients)
    np.savez(f"{sys.argv[1]}/{group.rank()}.npz", losses=losses, size=group.size(), **weights)
