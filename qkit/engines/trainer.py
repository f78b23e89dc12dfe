"""What an engine trains with: the seam between a step, which is the engine's, and the loop, which is the core's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Learning rate of what `learned.is_offset` names, unless another is given: 17 steps to the half that changes a value, or more.
OFFSET_RATE = 3e-2


@dataclass(frozen=True, slots=True)
class Distillation:
    """How much of a teacher is in the loss: (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student).

    Both distributions are taken at `temperature`; the square keeps the size of gradients (Hinton et al. 2015, arXiv
    1503.02531). Where only some of the teacher's logits are known, both are restricted to these tokens, so that a student
    that equals its teacher has nothing to learn.
    """

    temperature: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TopLogits:
    """The teacher's largest logits of one batch: float32 [batch, length, k], and their tokens int32 [batch, length, k]."""

    logits: NDArray[np.float32]
    tokens: NDArray[np.int32]


class Trainer(Protocol):
    """A model, its optimizer and the step that joins them."""

    def step(
        self, batches: Sequence[NDArray[np.int32]], *, learning_rate: float, targets: Sequence[TopLogits] = ()
    ) -> float:
        """One optimizer step on next-token prediction; returns the mean loss over all tokens before it, in nats.

        Args:
            batches: micro-batches [batch, length + 1], whose gradients are added up.
            targets: of each micro-batch, where the trainer distils from a file.
        """
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """All that training goes on from, by names that every engine shares.

        `weights.NAME` for every name in `Backend.tensors`, static ranges among them; `first_moment.NAME` and `second_moment.NAME`
        for those that are trained; `steps`, int64 []; and `rng.ENGINE`, which other engines do not read. Arrays may be views:
        good until the next step.
        """
        ...

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from a `state`, of this engine or another.

        Raises:
            ArtifactError: a tensor is missing or does not fit the model.
        """
        ...
