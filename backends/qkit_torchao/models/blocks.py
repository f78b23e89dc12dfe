"""Runs the blocks of a language model one after another, and sums the second moments of the inputs of their layers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qkit.engines.blocks import NO_EXPERTS, Hidden, Mixture, Seen
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit_torchao.layers import straight_through
from qkit_torchao.layers.stacks import join, stacks_of
from qkit_torchao.models import expert_inputs, mapped
from qkit_torchao.models.gradients import Call, Gradients, Passed
from qkit_torchao.models.sums import Sums

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


class TorchBlocks(Gradients):
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
        self._beside = -1  # values that blocks return beside states; -1: blocks return states alone
        if device != next(model.parameters()).device:
            mapped.lend(model, self._blocks, device)
        first, second = (self._record(torch.full((1, length), token)) for token in (0, 1))
        for mine, other, where in zip(first, second, self.paths, strict=True):
            if not _same(mine, other):
                raise BackendError(
                    f"{where} takes more than states from the tokens: qkit cannot run it by itself; fit by search"
                )
        self._calls = first
        self._check_several_rows(length)

    def _check_several_rows(self, length: int) -> None:
        """Refuses blocks whose other arguments, as recorded from one row of tokens, are for one row alone."""
        block, (rest, given) = self._blocks[0], self._calls[0]
        x = torch.from_numpy(self.enter(np.zeros((2, length), np.int32))).to(
            self.device, next(block.parameters()).dtype
        )
        try:
            with torch.no_grad():
                block(x, *rest, **given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BackendError(
                f"{self.paths[0]} does not run on several rows by itself ({str(error).splitlines()[0]}): fit by search"
            ) from None

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
        experts: Mapping[str, Mixture] = NO_EXPERTS,
    ) -> dict[str, Seen]:
        """See `Blocks.run`."""
        block, (rest, given) = self._blocks[number], self._calls[number]
        weight = next(block.parameters())
        sums = Sums(self._round_to)
        hooks = [
            self._model.get_submodule(path).register_forward_pre_hook(sums.watch(path, grid))
            for path, grid in watched.items()
        ]
        for path, mixture in experts.items():
            watch = expert_inputs.watching(mixture, sums.add)
            hooks.append(self._model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True))
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
    def product(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Blocks.product`."""
        return _to_numpy(torch.from_numpy(x).to(self.device).T @ torch.from_numpy(y).to(self.device))

    @torch.no_grad()
    def put(self, path: str, values: NDArray[np.float32]) -> None:
        """See `Blocks.put`."""
        parameter = self._model.get_parameter(f"{path}.weight")
        parameter.data = torch.from_numpy(values).to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def put_experts(self, path: str, values: Mapping[str, NDArray[np.float32]]) -> None:
        """See `Blocks.put_experts`."""
        module = self._model.get_submodule(path)
        found = join(stacks_of(module), {name: torch.from_numpy(array) for name, array in values.items()})
        for name, tensor in found.items():
            parameter = module.get_parameter(name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)

    def rest(self, number: int) -> None:
        """See `Blocks.rest`; pages of mapped files are the system's."""

    def leave(self, number: int) -> None:
        """See `Blocks.leave`."""
        for parameter in self._blocks[number].parameters():
            parameter.data = parameter.data.new_empty(0)

    def called(self, number: int) -> tuple[nn.Module, Call]:
        """A block, and everything that it takes besides states."""
        return self._blocks[number], self._calls[number]

    def module(self, path: str) -> nn.Module:
        """See `Gradients.module`."""
        return self._model.get_submodule(path)

    def model_after(self, states: Tensor, tokens: Tensor) -> Any:
        """See `Gradients.model_after`."""
        blocks, out = list(self._blocks), states if self._beside < 0 else (states, *[None] * self._beside)
        for number, block in enumerate(blocks):
            self._blocks[number] = Passed(block, out)
        try:
            return self._run_model(tokens)
        finally:
            for number, block in enumerate(blocks):
                self._blocks[number] = block

    def _record(self, tokens: Tensor) -> list[Call]:
        """The arguments of every block but for the states, of a run on `tokens`."""
        found: dict[int, Call] = {}

        def record(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
                found[number] = (args[1:], {name: value for name, value in given.items() if name != STATES})

            return hook

        def tell(_: nn.Module, __: Any, out: Any) -> None:
            self._beside = len(out) - 1 if isinstance(out, tuple) else -1

        hooks = [b.register_forward_pre_hook(record(n), with_kwargs=True) for n, b in enumerate(self._blocks)]
        hooks.append(self._blocks[-1].register_forward_hook(tell))
        try:
            with torch.no_grad():
                self._run_model(tokens)
        except (ValueError, TypeError, AttributeError) as error:
            reason = f"does not run on tokens alone ({str(error).splitlines()[0]})"
            raise BackendError(f"{type(self._model).__name__} {reason}: fit by search") from None
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [self.paths[number] for number in range(len(self._blocks)) if number not in found]:
            raise BackendError(
                f"{missing[0]} does not run with the model, so that its inputs are not known: fit by search"
            )
        return [found[number] for number in range(len(self._blocks))]

    def _run_model(self, tokens: Tensor) -> Any:
        known = {"use_cache": False} if hasattr(self._model, "config") else {}
        return self._model(tokens.long().to(self.device), **known)


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
