"""Training and measuring language models: token numbers in, logits out. Loops are the core's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

from qkit_mlx.adamw import of_ranges

TOKENS = 4096  #: how many tokens are evaluated at once, so that their logits fit into memory


class MlxTrainer:
    """AdamW over the trainable parameters of a model; matrices decay, vectors do not. One compiled step, as torch's."""

    def __init__(self, model: nn.Module, *, weight_decay: float) -> None:
        self.model = model
        self.optimizer = _AdamW(
            learning_rate=0.0, betas=[0.9, 0.95], eps=1e-8, weight_decay=weight_decay, bias_correction=True
        )
        self.optimizer.init(model.trainable_parameters())
        state = [model.state, self.optimizer.state, mx.random.state]
        self._compiled: Any = mx.compile(self._step, inputs=state, outputs=state)

    def step(self, tokens: NDArray[np.int32], *, learning_rate: float) -> float:
        """One step on next-token loss over `tokens` [batch, length + 1]; returns the loss before it, in nats."""
        self.model.train()
        self.optimizer.learning_rate = learning_rate
        loss = self._compiled(mx.array(tokens))
        mx.eval(loss, self.model.state, self.optimizer.state)
        return float(loss.item())

    def _step(self, tokens: mx.array) -> mx.array:
        loss: mx.array
        loss, gradients = nn.value_and_grad(self.model, lambda tokens: _nats(self.model, tokens).mean())(tokens)
        self.optimizer.update(self.model, _clipped(gradients, 1.0))
        return loss


class _AdamW(optim.AdamW):
    """Decays parameters of more than one dimension only, and no learned ranges."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self._ranges = of_ranges(gradients)
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        decays = parameter.ndim > 1 and id(gradient) not in self._ranges
        step = super().apply_single if decays else super(optim.AdamW, self).apply_single
        stepped: mx.array = step(gradient, parameter, state)
        return stepped


def _clipped(gradients: Any, largest: float) -> Any:
    """`gradients` with a norm, over all of them, of at most `largest`; `optim.clip_grad_norm` would sum in bfloat16."""
    arrays: Any = tree_flatten(gradients)
    squares = [g.astype(mx.float32).square().sum() for _, g in arrays]
    factor = mx.minimum(largest / (mx.sqrt(mx.stack(squares).sum()) + 1e-6), 1.0)
    return tree_map(lambda g: (g * factor).astype(g.dtype), gradients)


def loss(model: nn.Module, tokens: NDArray[np.int32]) -> float:
    """Mean next-token loss over `tokens` [batch, length + 1] in nats, with the model in evaluation mode."""
    with evaluating(model):
        total = sum(np.array(_nats(model, mx.array(part))).sum(dtype=np.float64) for part in _parts(tokens))
    return float(total) / tokens[:, 1:].size


def logits(model: nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [batch, length, vocabulary] of the model in evaluation mode."""
    with evaluating(model):
        return np.concatenate([np.array(model(mx.array(part)).astype(mx.float32)) for part in _parts(tokens)])


def _nats(model: nn.Module, tokens: mx.array) -> mx.array:
    """Next-token losses [batch, length] of `tokens` [batch, length + 1], in fp32."""
    nats: mx.array = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])
    return nats


def _parts(tokens: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    rows = max(1, TOKENS // tokens.shape[1])
    return (tokens[i : i + rows] for i in range(0, len(tokens), rows))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module._set_training_mode(training)
