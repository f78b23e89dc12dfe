"""One training step, a loss and logits in torch, on next-token prediction."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.learned import is_learned

ROWS = 16  #: sequences evaluated at a time


class TorchTrainer:
    """AdamW over the trainable parameters of a model; matrices decay, vectors and learned ranges do not."""

    def __init__(self, model: nn.Module, *, weight_decay: float) -> None:
        self.model = model
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        decays = {name: one.dim() > 1 and not is_learned(name) for name, one in trained.items()}
        groups = [
            {"params": [one for name, one in trained.items() if decays[name]], "weight_decay": weight_decay},
            {"params": [one for name, one in trained.items() if not decays[name]], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True
        )

    def step(self, tokens: NDArray[np.int32], *, learning_rate: float) -> float:
        """See `qkit.backend.Trainer.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        loss = _loss(self.model, _ids(self.model, tokens), reduction="mean")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained of `model`, for an optimizer; learned ranges, which must not decay, in a group of their own."""
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    ranges = [one for name, one in trained.items() if is_learned(name)]
    others = [one for name, one in trained.items() if not is_learned(name)]
    made = [{"params": others, "weight_decay": weight_decay}, {"params": ranges, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


def loss(model: nn.Module, tokens: NDArray[np.int32]) -> float:
    """Mean loss in nats per predicted token of `tokens` [batch, length + 1]."""
    with evaluating(model):
        parts = [_loss(model, ids, reduction="sum") for ids in _ids(model, tokens).split(ROWS)]
    return float(torch.stack(parts).double().sum()) / tokens[:, 1:].size


def logits(model: nn.Module, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits of every position of `tokens` [batch, length] -> float32 [batch, length, vocabulary]."""
    with evaluating(model):
        parts = [_logits(model, ids).float().cpu() for ids in _ids(model, tokens).split(ROWS)]
    return torch.cat(parts).numpy()


def _loss(model: nn.Module, ids: Tensor, *, reduction: str) -> Tensor:
    scores = _logits(model, ids[:, :-1]).float()
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Any = model(ids)
    scores: Tensor = getattr(out, "logits", out)
    return scores


def _ids(model: nn.Module, tokens: NDArray[np.int32]) -> Tensor:
    device = next(model.parameters()).device
    return torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode it had."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in were_training:
            module.training = True
