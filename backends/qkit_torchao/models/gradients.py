"""Gradients of a model that runs block by block: from labels that it draws to its last states, and back through one block."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.engines.blocks import Hidden

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """The layer was reached: nothing behind it has to run."""


class Gradients:
    """Verbs of `qkit.engines.blocks.Blocks`, for a class that knows its blocks.

    Attributes:
        device: that blocks run on.
    """

    device: torch.device

    def called(self, number: int) -> tuple[nn.Module, Call]:
        """A block, and everything that it takes besides states."""
        raise NotImplementedError

    def model_after(self, states: Tensor, tokens: Tensor) -> Any:
        """The output of the model for `states` after its last block; of `tokens` the shape counts."""
        raise NotImplementedError

    def module(self, path: str) -> nn.Module:
        """The module of the model at `path`."""
        raise NotImplementedError

    @torch.no_grad()
    def inputs_after(self, states: Hidden, path: str) -> Hidden:
        """See `Blocks.inputs_after`; one window after another, and nothing runs behind the layer."""
        weight, found = next(self.called(0)[0].parameters()), list[Hidden]()
        tokens = torch.zeros(1, states.shape[1], dtype=torch.long, device=self.device)

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(_to_numpy(args[0].flatten(0, -2)))
            raise _Reached

        with self.module(path).register_forward_pre_hook(stop):
            for row in states:
                with suppress(_Reached):
                    self.model_after(torch.from_numpy(np.array(row[None])).to(self.device, weight.dtype), tokens)
        return np.concatenate(found) if found else np.empty((0, 0), np.float32)

    def draw(self, states: Hidden, labels: NDArray[np.float32]) -> Hidden:
        """See `Blocks.draw`; one window after another, since their scores are long."""
        weight, found = next(self.called(0)[0].parameters()), list[Hidden]()
        tokens = torch.zeros(1, states.shape[1], dtype=torch.long, device=self.device)
        for row, mine in zip(states, labels, strict=True):
            x = torch.from_numpy(np.array(row[None])).to(self.device, weight.dtype).requires_grad_()
            with torch.enable_grad():
                out = self.model_after(x, tokens)
                logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
                if logits is None:
                    return np.zeros(states.shape, np.float32)
                scores = logits.flatten(0, -2).float().log_softmax(-1)
                sums = scores.detach().exp().cumsum(-1)
                wanted = torch.from_numpy(mine[: len(scores)]).to(self.device)[:, None] * sums[:, -1:]
                drawn = torch.searchsorted(sums, wanted, right=True).clamp_max(scores.shape[-1] - 1)
                (gradient,) = torch.autograd.grad(scores.gather(-1, drawn).sum(), x)
            found.append(_to_numpy(gradient))
        return np.concatenate(found)

    def pull(
        self, number: int, states: Hidden, gradient: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, NDArray[np.float32]]]:
        """See `Blocks.pull`."""
        block, (rest, given) = self.called(number)
        weight, shown = next(block.parameters()), dict[str, NDArray[np.float32]]()

        def show(path: str) -> Callable[..., None]:
            def keep(found: Tensor) -> None:
                shown[path] = _to_numpy(found.flatten(0, -2))

            return lambda _, __, out: out.register_hook(keep) and None

        x = torch.from_numpy(np.array(states)).to(self.device, weight.dtype).requires_grad_()
        hooks = [self.module(path).register_forward_hook(show(path)) for path in watched]
        try:
            with torch.enable_grad(), frozen_on(list(block.parameters()), self.device):
                out = block(x, *rest, **given)
                out = out[0] if isinstance(out, tuple) else out
                wanted = torch.from_numpy(np.array(gradient)).to(out.device, out.dtype)
                (found,) = torch.autograd.grad(out, x, wanted)
        finally:
            for hook in hooks:
                hook.remove()
        return _to_numpy(found), shown


class Passed(nn.Module):
    """In the place of a block: returns states whatever it is given, and has the attributes of the block."""

    def __init__(self, block: nn.Module, out: Any) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["out"] = block, out  # no parts of it

    def forward(self, *_: Any, **__: Any) -> Any:
        """The output that it was made with."""
        return self.__dict__["out"]

    def __getattr__(self, name: str) -> Any:
        """An attribute of the block."""
        return getattr(self.__dict__["block"], name)


@contextmanager
def frozen_on(parameters: Sequence[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Within, parameters lie on the device and get no gradient: a backward needs them after the block has run."""
    before = [(one, one.data, one.requires_grad) for one in parameters]
    try:
        for one in parameters:
            one.data = one.data.to(device)
            one.requires_grad_(False)
        yield
    finally:
        for one, home, wanted in before:
            one.data = home
            one.requires_grad_(wanted)


def _to_numpy(x: Tensor) -> Hidden:
    found: Hidden = x.float().cpu().numpy()
    return found
