"""The diagonal of the Fisher information of weights, with labels that the model draws itself."""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Scoring:
    """The verb of `qkit.engines.blocks.Scores`."""

    def squared_gradients(
        self, model: nn.Module, rows: NDArray[np.int32], paths: Collection[str], *, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        """See `Scores.squared_gradients`."""
        weights = {path: model.get_parameter(f"{path}.weight") for path in paths}
        wanted = {id(weight) for weight in weights.values()}
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
        device = next(iter(weights.values())).device
        random = torch.Generator().manual_seed(seed)
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in wanted)
            for row in rows:
                gradients = torch.autograd.grad(_log_probability(model, row, device, random), list(weights.values()))
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.addcmul_(gradient.float(), gradient.float())
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(before[name])
        return {path: (total / rows.size).cpu().numpy() for path, total in sums.items()}


def _log_probability(model: nn.Module, row: NDArray[np.int32], device: torch.device, random: torch.Generator) -> Tensor:
    """That of a label for each token of `row`, drawn from the model's distribution."""
    known = {"use_cache": False} if hasattr(model, "config") else {}
    out = model(torch.from_numpy(row.astype(np.int64))[None].to(device), **known)
    scores: Tensor = (out.logits if hasattr(out, "logits") else out)[0].float().log_softmax(-1)
    labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=random).to(device)
    return scores.gather(-1, labels).sum()
