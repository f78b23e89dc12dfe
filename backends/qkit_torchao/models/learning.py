"""Learned rounding: sign descent on the rounding offsets and scales of a block (SignRound, https://arxiv.org/abs/2309.05516).

A weight begins at a code c and takes the one nearest to c + v, where v is learned, in units of the distance of two codes: it
changes if its gradients agree for long enough. Scales learn a factor, whose steps move the largest code as far. Gradients pass
straight through both roundings. Unlike in SignRound, that of a scale takes the codes as fixed: solved ones fit their scales.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from qkit import element as constants
from qkit.element import Element
from qkit.engines.blocks import Hidden, Lesson
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.rounding import dequantize
from qkit.reference.steps import steps_of, stored
from qkit_torchao.models.blocks import TorchBlocks
from qkit_torchao.models.gradients import frozen_on

CHECKS = 2  #: times that the error of all windows is measured while a block learns
FACTORS = 0.5, 1.5  #: limits of the factor of a scale


class Learning:
    """The verb of `qkit.engines.blocks.Learns`."""

    def learn(
        self,
        blocks: TorchBlocks,
        number: int,
        states: Hidden,
        wanted: Hidden,
        starts: Mapping[str, QTensor[NDArray[Any]]],
        lesson: Lesson,
        root: NDArray[np.float64] | None,
    ) -> dict[str, QTensor[NDArray[Any]]]:
        """See `Learns.learn`."""
        lessons = _Lessons(blocks, number, starts, lesson.batch, root)
        best, least = lessons.found(), lessons.error(states, wanted)
        random, order = np.random.default_rng(lesson.seed), np.zeros(0, np.int64)
        for step in range(lesson.steps):
            if len(order) < lesson.batch:
                order = random.permutation(len(states))
            rows, order = order[: lesson.batch], order[lesson.batch :]
            lessons.step(states[rows], wanted[rows], lesson.reach * (1 - step / lesson.steps) / lesson.steps)
            if (step + 1) * CHECKS // lesson.steps > step * CHECKS // lesson.steps:
                error = lessons.error(states, wanted)
                if error < least:
                    best, least = lessons.found(), error
        return best


class _Lessons:
    """One block, and the layers that learn in it."""

    def __init__(
        self,
        blocks: TorchBlocks,
        number: int,
        starts: Mapping[str, QTensor[NDArray[Any]]],
        batch: int,
        root: NDArray[np.float64] | None,
    ) -> None:
        self._block, (self._rest, self._given) = blocks.called(number)
        self._prefix, self._batch = f"{blocks.paths[number]}.", batch
        weight = next(self._block.parameters())
        self._device, self._dtype = blocks.device, weight.dtype
        self._root = None if root is None else torch.tensor(root, dtype=torch.float32, device=self._device)
        self._layers = {path: _Layer(start, self._device) for path, start in starts.items()}

    def step(self, states: Hidden, wanted: Hidden, rate: float) -> None:
        """Moves everything that is learned by `rate` against the signs of its gradients."""
        learned = [one for layer in self._layers.values() for one in layer.learned]
        with frozen_on(list(self._block.parameters()), self._device):
            loss = self._differ(states, wanted).square().mean()
            gradients = torch.autograd.grad(loss, [tensor for tensor, _ in learned])
        for (tensor, share), gradient in zip(learned, gradients, strict=True):
            tensor.data -= rate * share * gradient.sign()
        for layer in self._layers.values():
            layer.factor.data.clamp_(*FACTORS)

    @torch.no_grad()
    def error(self, states: Hidden, wanted: Hidden) -> float:
        """The mean squared difference of all outputs, as they count."""
        found = 0.0
        for start in range(0, len(states), self._batch):
            rows = slice(start, start + self._batch)
            found += float(self._differ(states[rows], wanted[rows]).double().square().sum())
        return found / wanted.size

    def found(self) -> dict[str, QTensor[NDArray[Any]]]:
        """The present codes and scales."""
        return {path: layer.found() for path, layer in self._layers.items()}

    def _differ(self, states: Hidden, wanted: Hidden) -> Tensor:
        d = self._run(states) - self._tensor(wanted).float()
        return d if self._root is None else d @ self._root

    def _run(self, states: Hidden) -> Tensor:
        weights = {
            f"{path.removeprefix(self._prefix)}.weight": layer.values().to(self._dtype)
            for path, layer in self._layers.items()
        }
        out = functional_call(self._block, weights, (self._tensor(states), *self._rest), self._given)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.float()

    def _tensor(self, x: Hidden) -> Tensor:
        return torch.from_numpy(np.array(x)).to(self._device, self._dtype)


class _Layer:
    """The learned parts of one layer: an offset for each weight, and a factor for each scale that is more than a power of two."""

    def __init__(self, q: QTensor[NDArray[Any]], device: torch.device) -> None:
        self._grid, self._q = q.grid, q
        s, z = steps_of(q)
        shape = q.grid.group_shape(q.shape)
        units = (
            dequantize(q).astype(np.float64).reshape(shape) / s[..., None]
        )  # exact: the values are products of few bits
        self._s, self._z = (
            torch.tensor(s[..., None], dtype=torch.float32, device=device),
            torch.tensor(z[..., None], dtype=torch.float32, device=device),
        )
        self._start = torch.tensor(units, dtype=torch.float32, device=device)
        self._gap = _gap(self._start, q.grid.element)
        self.offset = torch.zeros_like(self._start).requires_grad_()
        self.factor = torch.ones_like(self._s).requires_grad_()

    @property
    def learned(self) -> list[tuple[Tensor, float]]:
        """The tensors to move, and the shares of a step that they take."""
        largest = self._grid.element.largest if self._grid.symmetric else self._grid.element.levels
        offset, factor = (self.offset, 1.0), (self.factor, 1 / largest)
        return [offset] if _power_of_two(self._grid) else [offset, factor]

    def values(self) -> Tensor:
        """The quantized weight, through which gradients pass."""
        s = self._scales()
        return (self._units() * s).reshape(self._q.shape)

    @torch.no_grad()
    def found(self) -> QTensor[NDArray[Any]]:
        """The present codes and scales."""
        s = self._scales()
        units, steps, zeros = (x.double().cpu().numpy() for x in (self._units(), s, self._z))
        return stored(
            units.reshape(self._q.shape), steps[..., 0], zeros[..., 0], self._grid, self._q.tensor_scale, "float32"
        )

    def _scales(self) -> Tensor:
        if _power_of_two(self._grid):
            return self._s
        wanted = self._s * self.factor
        if self._q.tensor_scale is None:
            near = wanted.detach().bfloat16().float()
            near = torch.where(near.abs() < constants.MIN_SCALE, self._s, near)
        else:
            tensor = float(self._q.tensor_scale)
            near = (wanted.detach() / tensor).clamp(constants.MIN_BLOCK_SCALE, 448.0)
            near = near.to(torch.float8_e4m3fn).float() * tensor
        return wanted + (near - wanted).detach()

    def _units(self) -> Tensor:
        element, y = self._grid.element, self._start + self.offset * self._gap
        if element.kind == "float":
            gap = _gap(y.detach(), element)
            rounded, low, high = (y.detach() / gap).round() * gap, -element.largest, element.largest
            return (y + (rounded - y.detach())).clamp(low, high)
        rounded = y + (y.detach().round() - y.detach())
        if self._grid.symmetric:
            return rounded.clamp(element.lowest, element.highest)
        return torch.minimum(torch.maximum(rounded, -self._z), element.levels - self._z)


def _gap(y: Tensor, element: Element) -> Tensor:
    """The distance of the codes around `y`."""
    if element.kind == "integer":
        return torch.ones_like(y)
    floor = torch.frexp(y).exponent - 1
    return torch.ldexp(torch.ones_like(y), floor.clamp_min(element.min_exponent) - element.mantissa)


def _power_of_two(grid: Grid) -> bool:
    return grid.stored_scales == "e8m0"
