"""Training at the seam: an engine carries out one step, and the core has the loop around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Default learning rate of the parameters that `reference.learned.is_offset` names. A value changes after half a unit: 17 steps.
OFFSET_RATE = 3e-2
#: The most logits that a head computes at a time, where an engine computes its loss in chunks: 128 MB in float32.
LOGITS = 2**25


@dataclass(frozen=True, slots=True)
class Distillation:
    """The teacher's share of the loss: (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student).

    Both distributions are at `temperature`; its square preserves the size of gradients (Hinton et al. 2015, arXiv 1503.02531).
    Where only some of the teacher's logits are known, both distributions cover these tokens only. A student that equals its
    teacher then has a gradient of zero.

    Attributes:
        temperature: divides the logits of both before the divergence.
        weight: 0 learns from the text alone, 1 from the teacher alone.
    """

    temperature: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TopLogits:
    """The teacher's largest logits of one batch: float32 [batch, length, k], and their tokens int32 [batch, length, k]."""

    logits: NDArray[np.float32]
    tokens: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AdamWOptions:
    """Options of AdamW (Loshchilov and Hutter, 2019).

    Attributes:
        learning_rate: a number, or a schedule of the framework where its optimizers take one.
        offset_learning_rate: the learning rate of the parameters that `reference.learned.is_offset` names.
    """

    learning_rate: Any
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    offset_learning_rate: Any = OFFSET_RATE


@dataclass(frozen=True, slots=True, eq=False)
class TrainerOptions:
    """Options of a `Trainer`.

    Attributes:
        clip: the largest norm of the gradient, over all parameters; infinity does not clip.
        offset_ratio: the learning rate of the parameters that `reference.learned.is_offset` names, as a multiple of a step's.
        seed: the seed of the engine's random numbers, for dropout; None leaves their state alone.
        autocast: bfloat16 products over float32 master weights.
        compiled: whether steps are compiled; None leaves it to the engine.
        recompute: whether the backward pass computes layers again, to save memory.
        distillation: the teacher's share of the loss; None learns from the text alone.
        teacher: a model of this engine that gives the teacher's logits; None where each step passes `targets`.
    """

    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    offset_ratio: float = 1.0
    seed: int | None = None
    autocast: bool = False
    compiled: bool | None = None
    recompute: bool = False
    distillation: Distillation | None = None
    teacher: Any = None


def count_learned(batches: Sequence[NDArray[np.int32]], masks: Sequence[NDArray[np.bool_]]) -> int:
    """How many tokens a step learns."""
    return sum(int(mask.sum()) for mask in masks) if masks else sum(tokens[:, 1:].size for tokens in batches)


class Trainer(Protocol):
    """A model, its optimizer and the step that joins them."""

    def step(
        self,
        batches: Sequence[NDArray[np.int32]],
        *,
        learning_rate: float,
        targets: Sequence[TopLogits] = (),
        masks: Sequence[NDArray[np.bool_]] = (),
    ) -> float:
        """One optimizer step on next-token prediction; returns the mean loss over all learned tokens before it, in nats.

        Args:
            batches: micro-batches [batch, length + 1], whose gradients are added up.
            targets: the teacher's logits of each micro-batch, where the trainer distils from a file.
            masks: which tokens after the first of each micro-batch are learned [batch, length]; none: all.
        """
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """Every array that training continues from, by names that all engines share.

        `weights.NAME` for every name in `Modules.tensors`, static ranges among them; `first_moment.NAME` and `second_moment.NAME`
        for the trained ones; `steps`, int64 []; and `rng.ENGINE`, which other engines do not read. Arrays may be views:
        the next step changes them.
        """
        ...

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continues from a `state`, of this engine or another.

        Raises:
            ArtifactError: a tensor is missing or does not fit the model.
        """
        ...
