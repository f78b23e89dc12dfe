"""The seam of calibration: the blocks of a language model, which run one after another while somebody watches their layers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from qkit.engines.protocol import Builds
from qkit.grid import Grid
from qkit.qtensor import QTensor

Hidden = NDArray[np.float32]  #: the states [batch, length, width] between two blocks


@dataclass(frozen=True, slots=True)
class Seen:
    """The inputs of one layer.

    Attributes:
        like: the first layer of the block with the very same inputs; it has the moments of both.
        moments: E[x x'] [n, n], or None where another layer has them.
        tokens: how many inputs there were.
    """

    like: str
    moments: NDArray[np.float32] | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts whose inputs are watched, each projection of each expert by itself.

    Attributes:
        grid: that inputs are rounded to first, if any.
        paths: in files, by the number of the expert and its projection.
    """

    grid: Grid | None
    paths: Mapping[tuple[int, str], str]


NO_EXPERTS: Mapping[str, Mixture] = {}


class Blocks(Protocol):
    """The blocks of one language model.

    Attributes:
        paths: of the blocks, in the order in which they run.
    """

    paths: tuple[str, ...]

    def enter(self, tokens: NDArray[np.int32]) -> Hidden:
        """The states that the first block takes for `tokens` [batch, length]."""
        ...

    def run(
        self,
        number: int,
        states: Iterable[Hidden],
        watched: Mapping[str, Grid | None],
        *,
        put: Callable[[Hidden], None],
        experts: Mapping[str, Mixture] = NO_EXPERTS,
    ) -> dict[str, Seen]:
        """Runs a block on each of `states`, and gives its outputs to `put` in the same order.

        Args:
            watched: paths of linear layers of the block, each with the grid that its inputs are rounded to first, if any.
            experts: of the block, by the path of their layer.

        Returns:
            The inputs of the watched layers, and of experts by their paths in files. A layer that did not run is not among
            them, nor is an expert that no token reached, or whose class shows no inputs.
        """
        ...

    def look(
        self, number: int, states: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]]:
        """The outputs of a block for one batch of states; and the inputs and outputs [tokens, n] of linear layers of it.

        The layers stand in the order in which they run; one that did not run is missing.
        """
        ...

    def inputs_after(self, states: Hidden, path: str) -> Hidden:
        """The inputs [tokens, n] of the linear layer at `path` behind the blocks, for states after the last one.

        Empty, if the layer does not run; as many as it has, if it does not run for every token.
        """
        ...

    def draw(self, states: Hidden, labels: NDArray[np.float32]) -> Hidden:
        """The gradient, with respect to states after the last block, of the log-probability of labels that the model draws.

        Args:
            labels: numbers in [0, 1), one for each token: a label is the first whose cumulative probability is greater. A
                classifier draws one label for a row, by its first number. Zeros come from models without such an output.
        """
        ...

    def pull(
        self, number: int, states: Hidden, gradient: Hidden, watched: Collection[str]
    ) -> tuple[Hidden, dict[str, NDArray[np.float32]]]:
        """The gradient with respect to the states before a block, given that of its outputs; and those of outputs of layers.

        Args:
            watched: paths of linear layers of the block; gradients of their outputs are [tokens, outputs].
        """
        ...

    def product(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
        """X' Y [n, m] of x [tokens, n] and y [tokens, m], in float32, where blocks run."""
        ...

    def put(self, path: str, values: NDArray[np.float32]) -> None:
        """Gives the weight of a linear layer other values, rounded to its type."""
        ...

    def put_experts(self, path: str, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Gives experts other weights [experts, outputs, inputs], by projection, rounded to their type."""
        ...

    def rest(self, number: int) -> None:
        """Lets go of the weights of a block until it runs again, where they are in its model's files."""
        ...

    def leave(self, number: int) -> None:
        """Lets go of the weights of a block, which does not run again."""
        ...


class Watches(Builds, Protocol):
    """Language models whose blocks run by themselves."""

    def mapping(self) -> Self:
        """This engine, for models to run block by block: where it can, weights stay in their files until a block runs."""
        ...

    def blocks(self, model: Any, *, length: int) -> Blocks:
        """The blocks of a float model, for rows of `length` tokens without padding.

        Raises:
            BackendError: the model has no list of blocks, or its blocks take more from the tokens than the states.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lesson:
    """How the rounding of a block is learned.

    Attributes:
        steps: of sign descent; none keep the codes as they are.
        batch: windows of one step.
        seed: of their order.
        reach: of an offset whose gradients always agree, in units of half the distance of two codes; as much of a scale's factor.
    """

    steps: int = 16
    batch: int = 8
    seed: int = 0
    reach: float = 1.0


class Learns(Watches, Protocol):
    """Language models whose blocks learn which way to round."""

    def learn(
        self,
        blocks: Any,
        number: int,
        states: Hidden,
        wanted: Hidden,
        starts: Mapping[str, QTensor[NDArray[Any]]],
        lesson: Lesson,
        root: NDArray[np.float64] | None,
    ) -> dict[str, QTensor[NDArray[Any]]]:
        """Codes and scales of layers with which a block comes as near to its `wanted` outputs as any that were tried.

        Args:
            blocks: of `Watches.blocks`.
            number: of the block.
            states: before the block, [windows, length, width].
            wanted: states after it, of the same shape.
            starts: codes and scales to begin with, by path of a layer.
            root: R [width, width], where an error e of a token's state counts as the square of e R; None: of e.
        """
        ...


class Scores(Watches, Protocol):
    """Language models whose weights' importance is known."""

    def squared_gradients(
        self, model: Any, rows: NDArray[np.int32], paths: Collection[str], *, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        """The diagonal of the Fisher information of the weights of layers of a float model, for each token, by path.

        The mean, over `rows` [windows, length], of the square of the gradient of a window's log-probability, with labels that the
        model draws from its own distribution by `seed`, divided by `length`.
        """
        ...
