"""Runs the blocks of a language model one after another, and sums the second moments of the inputs of their layers."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

from qkit.engines.blocks import NO_EXPERTS, Hidden, Mixture, Seen
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit_mlx.layers import straight_through
from qkit_mlx.models import expert_inputs, mapped, surgery
from qkit_mlx.models.stand_ins import StandIn, Tapped, Watched
from qkit_mlx.models.sums import Sums, product

Call = tuple[tuple[Any, ...], dict[str, Any]]
LAYERS = "layers"  #: mlx-lm's name for the blocks, of the model and inside it


class _Entered(Exception):
    """The first block was reached: nothing behind it has to run."""


class Watching:
    """The verbs of `qkit.engines.blocks.Watches`.

    Attributes:
        maps: whether the arrays of float models are read from their files when they are needed.
    """

    maps = False

    def mapping(self) -> Self:
        """See `Watches.mapping`."""
        made = copy(self)
        made.maps = True
        return made

    def blocks(self, model: nn.Module, *, length: int) -> "MlxBlocks":
        """See `Watches.blocks`."""
        return MlxBlocks(model, length=length, round_to=straight_through.fake_quantize)


class MlxBlocks:
    """See `qkit.engines.blocks.Blocks`. Everything that blocks take besides states is recorded once, from two rows of tokens."""

    product = staticmethod(product)

    def __init__(self, model: nn.Module, *, length: int, round_to: Callable[[mx.array, Grid], mx.array]) -> None:
        path, self._blocks = _list_of_blocks(model)
        self.paths = tuple(f"{path}.{number}" for number in range(len(self._blocks)))
        self._model, self._round_to = model, round_to
        self._layers = {layer.path: layer.module for layer in surgery.layers(model)}  # now: blocks lose their weights
        self._beside = -1  # values that blocks return beside states; -1: blocks return states alone
        first, second = (self._record(mx.full((1, length), token)) for token in (0, 1))
        for mine, other, where in zip(first, second, self.paths, strict=True):
            if not _same(mine, other):
                raise BackendError(
                    f"{where} takes more than states from the tokens: qkit cannot run it by itself; fit by search"
                )
        self._calls = first

    def enter(self, tokens: NDArray[np.int32]) -> Hidden:
        """See `Blocks.enter`."""
        found: list[mx.array] = []

        def stop(_: int, states: mx.array, *rest: Any, **given: Any) -> mx.array:
            found.append(states)
            raise _Entered

        with suppress(_Entered):
            self._run_model(mx.array(tokens), stop)
        return _to_numpy(found[0])

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
        dtype = _dtype(block)
        sums = Sums(self._round_to)
        with (
            self._watching({path: partial(sums.see, path, grid) for path, grid in watched.items()}),
            expert_inputs.watching([(self._layers[path], mixture) for path, mixture in experts.items()], sums.add),
        ):
            for one in states:
                sums.forget()
                out = block(mx.array(np.array(one)).astype(dtype), *rest, **given)
                out = out[0] if isinstance(out, tuple) else out
                mx.eval(out, sums.arrays())
                put(_to_numpy(out))
        return sums.seen()

    def look(
        self, number: int, states: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, tuple[Hidden, Hidden]]]:
        """See `Blocks.look`."""
        block, (rest, given) = self._blocks[number], self._calls[number]
        shown: dict[str, tuple[mx.array, mx.array]] = {}

        def show(path: str, x: mx.array, y: mx.array) -> None:
            shown[path] = (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

        with self._watching({path: partial(show, path) for path in watched}):
            out = block(mx.array(np.array(states)).astype(_dtype(block)), *rest, **given)
        found = {path: (_to_numpy(x), _to_numpy(y)) for path, (x, y) in shown.items()}
        return _to_numpy(out[0] if isinstance(out, tuple) else out), found

    def inputs_after(self, states: Hidden, path: str) -> Hidden:
        """See `Blocks.inputs_after`; one window after another."""
        dtype, found = _dtype(self._blocks[0]), list[Hidden]()
        for row in states:
            x = mx.array(np.array(row[None])).astype(dtype)
            out, seen = x if self._beside < 0 else (x, *[None] * self._beside), list[mx.array]()
            with self._watching({path: partial(_take, seen)}):
                self._run_model(mx.zeros((1, states.shape[1]), mx.int32), lambda *_, out=out, **__: out)
            found += [_to_numpy(one.reshape(-1, one.shape[-1])) for one in seen]
        return np.concatenate(found) if found else np.empty((0, 0), np.float32)

    def draw(self, states: Hidden, labels: NDArray[np.float32]) -> Hidden:
        """See `Blocks.draw`; one window after another, since their scores are long."""
        dtype, found = _dtype(self._blocks[0]), list[Hidden]()
        tokens = mx.zeros((1, states.shape[1]), mx.int32)

        def scores(x: mx.array) -> mx.array:
            out = x if self._beside < 0 else (x, *[None] * self._beside)
            logits = self._run_model(tokens, lambda *_, **__: out)[0].astype(mx.float32)
            return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

        for row, mine in zip(states, labels, strict=True):
            x = mx.array(np.array(row[None])).astype(dtype)
            sums = mx.cumsum(mx.exp(scores(x)), axis=-1)
            drawn = (sums <= mx.array(mine)[:, None] * sums[:, -1:]).sum(axis=-1, keepdims=True)
            drawn = mx.minimum(drawn, sums.shape[-1] - 1)
            gradient = mx.grad(lambda x, drawn=drawn: mx.take_along_axis(scores(x), drawn, axis=-1).sum())(x)
            found.append(_to_numpy(gradient))
        return np.concatenate(found)

    def pull(
        self, number: int, states: Hidden, gradient: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, NDArray[np.float32]]]:
        """See `Blocks.pull`."""
        block, (rest, given) = self._blocks[number], self._calls[number]
        x = mx.array(np.array(states)).astype(_dtype(block))
        taps: dict[str, mx.array] = {}

        def run(x: mx.array, *added: mx.array) -> mx.array:
            taps.update(zip(watched, added, strict=True))
            out = block(x, *rest, **given)
            found: mx.array = out[0] if isinstance(out, tuple) else out
            return found

        own = {path: self._layers[path] for path in watched}
        none = [mx.zeros((*x.shape[:-1], own[path].weight.shape[0]), x.dtype) for path in watched]
        surgery.replace(self._model, {path: Tapped(own[path], path, taps) for path in own})
        try:
            _, (found, *every) = mx.vjp(run, [x, *none], [mx.array(np.array(gradient)).astype(x.dtype)])
            mx.eval(found, every)
        finally:
            surgery.replace(self._model, own)
        shown = {path: _to_numpy(one).reshape(-1, one.shape[-1]) for path, one in zip(watched, every, strict=True)}
        return _to_numpy(found), shown

    def put(self, path: str, values: NDArray[np.float32]) -> None:
        """See `Blocks.put`."""
        layer = self._layers[path]
        layer.weight = mx.array(values).astype(layer.weight.dtype)

    def put_experts(self, path: str, values: Mapping[str, NDArray[np.float32]]) -> None:
        """See `Blocks.put_experts`."""
        block = self._layers[path]
        for name, part in expert_inputs.parts(block).items():
            part.weight = mx.array(values[name]).astype(part.weight.dtype)

    def rest(self, number: int) -> None:
        """See `Blocks.rest`."""
        mapped.forget(self._model, self.paths[number])

    def leave(self, number: int) -> None:
        """See `Blocks.leave`."""
        block = self._blocks[number]
        block.update(tree_map(lambda one: mx.zeros(0, one.dtype), block.parameters()))

    @contextmanager
    def _watching(self, shows: Mapping[str, Callable[[mx.array, mx.array], None]]) -> Iterator[None]:
        """Within, each layer of `shows` calls its function with its inputs and outputs."""
        own = {path: self._layers[path] for path in shows}
        surgery.replace(self._model, {path: Watched(own[path], shows[path]) for path in own})
        try:
            yield
        finally:
            surgery.replace(self._model, own)

    def _record(self, tokens: mx.array) -> list[Call]:
        """The arguments of every block but for the states, of a run on `tokens`."""
        found: dict[int, Call] = {}

        def record(number: int, states: mx.array, *rest: Any, **given: Any) -> Any:
            found[number] = (rest, given)
            out = blocks[number](states, *rest, **given)
            self._beside = len(out) - 1 if isinstance(out, tuple) else -1
            mx.eval(out)
            stand_ins, self._blocks[:] = list(self._blocks), blocks  # the model's arrays are found by their paths
            mapped.forget(self._model, self.paths[number])
            self._blocks[:] = stand_ins
            return out

        blocks = list(self._blocks)
        mx.eval(self._run_model(tokens, record))
        if missing := [self.paths[number] for number in range(len(blocks)) if number not in found]:
            raise BackendError(
                f"{missing[0]} does not run with the model, so that its inputs are not known: fit by search"
            )
        return [found[number] for number in range(len(blocks))]

    def _run_model(self, tokens: mx.array, called: Callable[..., Any]) -> mx.array:
        """The model's output for `tokens`, with a stand-in in the place of each block that calls `called`."""
        before = list(self._blocks)
        self._blocks[:] = [StandIn(block, number, called) for number, block in enumerate(before)]
        try:
            out: mx.array = self._model(tokens)
            return out
        finally:
            self._blocks[:] = before


def _list_of_blocks(model: nn.Module) -> tuple[str, list[Any]]:
    """The list of blocks by mlx-lm's name for it, of the language model where it has towers; and its path."""
    found = [
        (f"{path}.{LAYERS}" if path else LAYERS, module[LAYERS])
        for path, module in model.named_modules()
        if isinstance(module.get(LAYERS), list) and module[LAYERS] and "vision" not in path
    ]
    if not found:
        raise BackendError(f"{type(model).__name__} has no list of blocks, which run one after another: fit by search")
    return max(found, key=lambda one: len(one[1]))


def _dtype(block: nn.Module) -> mx.Dtype:
    """The type in which a block takes its states: that of its first weight."""
    arrays: Any = tree_flatten(block.parameters())
    found: mx.Dtype = next(x.dtype for _, x in arrays if mx.issubdtype(x.dtype, mx.floating))
    return found


def _take(seen: list[mx.array], x: mx.array, _: mx.array) -> None:
    seen.append(x)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, arrays bit for bit."""
    if isinstance(one, mx.array):
        return isinstance(other, mx.array) and bool(mx.array_equal(one, other))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (not isinstance(one, str) or one == other)


def _to_numpy(x: mx.array) -> Hidden:
    return np.array(x.astype(mx.float32))
