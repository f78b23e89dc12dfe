"""Runs the blocks of a language model one after another, and sums the second moments of the inputs of their layers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.engines.blocks import Hidden, Seen
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit_torchao.layers import straight_through
from qkit_torchao.models import mapped

Call = tuple[tuple[Any, ...], dict[str, Any]]
STATES = "hidden_states"  #: the name under which some models give a block its states


class _Entered(Exception):
    """The first block was reached: nothing behind it has to run."""


class Watching:
    """The verbs of `qkit.engines.blocks.Watches`.

    Attributes:
        device: of new tensors.
        maps: whether float models are maps of their files.
    """

    device: torch.device
    maps = False

    def mapping(self) -> Self:
        """See `Watches.mapping`."""
        made = copy(self)
        made.maps = True
        return made

    def from_numpy(self, x: NDArray[Any]) -> Tensor:
        """See `Arrays.from_numpy`."""
        raise NotImplementedError

    def mapped(self, config: Mapping[str, Any]) -> nn.Module:
        """As `Builds.build`, for a model whose weights will be maps."""
        return mapped.build(config)

    @torch.no_grad()
    def give(self, tensor: Tensor, array: NDArray[Any]) -> None:
        """Writes `array` to a tensor of a model, or makes the tensor a map of its file where models are maps."""
        if self.maps:
            mapped.give(tensor, array, self.from_numpy)
        else:
            tensor.copy_(self.from_numpy(array))

    def blocks(self, model: nn.Module, *, length: int) -> "TorchBlocks":
        """See `Watches.blocks`."""
        device = self.device if self.maps else next(model.parameters()).device
        return TorchBlocks(model, length=length, round_to=straight_through.fake_quantize, device=device)


class TorchBlocks:
    """See `qkit.engines.blocks.Blocks`. Everything that blocks take besides states is recorded once, from two rows of tokens.

    Attributes:
        device: that blocks run on.
    """

    def __init__(
        self, model: nn.Module, *, length: int, round_to: Callable[[Tensor, Grid], Tensor], device: torch.device
    ) -> None:
        path, self._blocks = _list_of_blocks(model)
        self.paths = tuple(f"{path}.{number}" for number in range(len(self._blocks)))
        self._model, self._round_to, self.device = model, round_to, device
        if device != next(model.parameters()).device:
            mapped.lend(model, self._blocks, device)
        first, second = (self._record(torch.full((1, length), token)) for token in (0, 1))
        for mine, other, where in zip(first, second, self.paths, strict=True):
            if not _same(mine, other):
                raise BackendError(
                    f"{where} takes more than states from the tokens: qkit cannot run it by itself; fit by search"
                )
        self._calls = first

    @torch.no_grad()
    def enter(self, tokens: NDArray[np.int32]) -> Hidden:
        """See `Blocks.enter`."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            found.append(_states(args, given))
            raise _Entered

        hook = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        with suppress(_Entered), hook:
            self._run_model(torch.from_numpy(tokens))
        return _to_numpy(found[0])

    @torch.no_grad()
    def run(
        self,
        number: int,
        states: Iterable[Hidden],
        watched: Mapping[str, Grid | None],
        *,
        put: Callable[[Hidden], None],
    ) -> dict[str, Seen]:
        """See `Blocks.run`."""
        block, (rest, given) = self._blocks[number], self._calls[number]
        weight = next(block.parameters())
        sums = _Sums(self._round_to)
        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(sums.watch(path, grid))
            for path, grid in watched.items()
        ]
        try:
            for one in states:
                sums.forget()
                x = torch.from_numpy(np.array(one)).to(self.device, weight.dtype)
                out = block(x, *rest, **given)
                put(_to_numpy(out[0] if isinstance(out, tuple) else out))
        finally:
            for hook in hooks:
                hook.remove()
        return sums.seen()

    @torch.no_grad()
    def look(
        self, number: int, states: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, tuple[Hidden, Hidden]]]:
        """See `Blocks.look`."""
        block, (rest, given) = self._blocks[number], self._calls[number]
        weight, shown = next(block.parameters()), dict[str, tuple[Hidden, Hidden]]()

        def show(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                shown[path] = (_to_numpy(args[0].flatten(0, -2)), _to_numpy(out.flatten(0, -2)))

            return hook

        hooks = [self._model.get_submodule(path).register_forward_hook(show(path)) for path in watched]
        try:
            out = block(torch.from_numpy(np.array(states)).to(self.device, weight.dtype), *rest, **given)
        finally:
            for hook in hooks:
                hook.remove()
        return _to_numpy(out[0] if isinstance(out, tuple) else out), shown

    @torch.no_grad()
    def put(self, path: str, values: NDArray[np.float32]) -> None:
        """See `Blocks.put`."""
        parameter = self._model.get_parameter(f"{path}.weight")
        parameter.data = torch.from_numpy(values).to(parameter.device, parameter.dtype)

    def leave(self, number: int) -> None:
        """See `Blocks.leave`."""
        for parameter in self._blocks[number].parameters():
            parameter.data = parameter.data.new_empty(0)

    def called(self, number: int) -> tuple[nn.Module, Call]:
        """A block, and everything that it takes besides states."""
        return self._blocks[number], self._calls[number]

    def _record(self, tokens: Tensor) -> list[Call]:
        """The arguments of every block but for the states, of a run on `tokens`."""
        found: dict[int, Call] = {}

        def record(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
                found[number] = (args[1:], {name: value for name, value in given.items() if name != STATES})

            return hook

        hooks = [b.register_forward_pre_hook(record(n), with_kwargs=True) for n, b in enumerate(self._blocks)]
        try:
            with torch.no_grad():
                self._run_model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [self.paths[number] for number in range(len(self._blocks)) if number not in found]:
            raise BackendError(
                f"{missing[0]} does not run with the model, so that its inputs are not known: fit by search"
            )
        return [found[number] for number in range(len(self._blocks))]

    def _run_model(self, tokens: Tensor) -> None:
        known = {"use_cache": False} if hasattr(self._model, "config") else {}
        self._model(tokens.long().to(self.device), **known)


class _Sums:
    """Sums of x x' of layers while a block runs. Layers that get one tensor share one sum."""

    def __init__(self, round_to: Callable[[Tensor, Grid], Tensor]) -> None:
        self._round_to = round_to
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._like: dict[str, str] = {}
        self._present: list[tuple[Tensor, Grid | None, str]] = []

    def forget(self) -> None:
        """Begins the next run: tensors of the last one are no longer the same as any."""
        self._present.clear()

    def watch(self, path: str, grid: Grid | None) -> Callable[..., None]:
        """The hook of the layer at `path`."""

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            like = next((one for tensor, of, one in self._present if tensor is x and of == grid), path)
            self._like.setdefault(path, like)
            self._tokens[path] = self._tokens.get(path, 0) + x.numel() // x.shape[-1]
            if self._like[path] != path:
                return
            self._present.append((x, grid, path))
            rows = (x if grid is None else self._round_to(x, grid)).reshape(-1, x.shape[-1]).float()
            if path not in self._sums:
                self._sums[path] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._sums[path].addmm_(rows.T, rows)

        return see

    def seen(self) -> dict[str, Seen]:
        """The moments of each layer that ran."""
        found = {}
        for path, like in self._like.items():
            total = self._sums.get(path)
            moments = None if total is None else (total / max(self._tokens[path], 1)).cpu().numpy()
            found[path] = Seen(like, moments, self._tokens[path])
        return found


def _list_of_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of equal modules that is in no other list, of the language model where it has towers; and its path."""
    find: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = find() if find else model
    paths = {id(module): path for path, module in model.named_modules()}
    lists = [(paths[id(m)], m) for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) and id(m) in paths]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise BackendError(f"{type(model).__name__} has no list of blocks, which run one after another: fit by search")
    return max(outer, key=lambda one: sum(p.numel() for p in one[1].parameters()))


def _states(args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
    found = args[0] if args else given[STATES]
    assert isinstance(found, Tensor)
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)


def _to_numpy(x: Tensor) -> Hidden:
    found: Hidden = x.float().cpu().numpy()
    return found
