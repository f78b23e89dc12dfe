"""Methods of training at the seam: the core has the rows and the model, and the engine calls the library that trains."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from qkit.engines.protocol import Trains
from qkit.engines.trainer import AdamWOptions

Method = Literal["sft", "dpo", "orpo"]
METHODS: Final[tuple[Method, ...]] = ("sft", "dpo", "orpo")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Held:
    """Evaluations on rows that are not trained on.

    Attributes:
        rows: as those of `TuneOptions`.
        every: steps between two evaluations; the last step has one, too.
        best: whether the model ends with the weights of the evaluation with the lowest loss.
        patience, threshold: how many evaluations in a row without one lower by more than `threshold` end the training; None:
            none do.
        on_own_grids: evaluations are inside of this, so that a schedule does not touch them.
        evaluated: called after each evaluation with the number of its step and its loss.
    """

    rows: Sequence[Mapping[str, Any]]
    every: int
    best: bool
    patience: int | None
    threshold: float
    on_own_grids: Callable[[], AbstractContextManager[None]]
    evaluated: Callable[[int, float], None]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TuneOptions:
    """A method that another library carries out on a prepared model.

    Attributes:
        rows: for `sft`, each with `input_ids` and `completion_mask`, of equal lengths. For `dpo` and `orpo`, each with `prompt`,
            `chosen` and `rejected`, texts or lists of messages; and their tokens in `prompt_ids`, `chosen_ids`, `rejected_ids`.
        tokenizer: the model's directory.
        reference: for `dpo`, the model that the trained one is compared with.
        rate: the learning rate of a step, which counts from 1.
        before: called with the number of each step, before it; None: nothing changes between steps.
        record: called after each step with its number, its loss, its learning rate and its tokens.
        place: the folder of the checkpoints. Training goes on from the last one in it.
        checkpoint_every: steps between two checkpoints.
        checkpointed: called after each checkpoint with its step.
        stop: asked after each step with its number; where it says yes, a checkpoint ends the training.
        held: evaluations; None: there are none.
    """

    method: Method
    rows: Sequence[Mapping[str, Any]]
    tokenizer: Path
    reference: Any
    steps: int
    batch: int
    accumulation: int
    length: int
    packing: bool
    beta: float
    clip: float
    seed: int
    autocast: bool
    recompute: bool
    optimizer: AdamWOptions
    rate: Callable[[int], float]
    before: Callable[[int], None] | None
    record: Callable[[int, float, float, int], None]
    place: Path
    checkpoint_every: int
    checkpointed: Callable[[int], None]
    stop: Callable[[int], bool]
    held: Held | None = None


class Tunes(Trains, Protocol):
    """Methods of training that another library carries out: supervised fine-tuning and preferences."""

    def tune(self, model: Any, options: TuneOptions) -> None:
        """Trains the prepared `model` in place. It has taken fewer than `options.steps` steps only where `options.stop` said yes,
        or evaluations ended it.

        Raises:
            BackendError: the library is missing, or cannot do as `options` say.
        """
        ...

    def tuned(self, place: Path) -> int:
        """How many steps the last checkpoint in `place` has taken; 0 where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The quantizer that a command's own options ask for.

    Attributes:
        flag: the option, for messages.
        packed: whether it quantizes the loaded model, and not the values that it trains with.
        grid: `affine` or `mxfp4`.
        bits, group: of one number; of numbers with one scale, 0: all of a tensor.
        start, interval: the first step that quantizes; the steps between two refreshes.
    """

    flag: str
    packed: bool
    grid: Literal["affine", "mxfp4"]
    bits: int
    group: int
    start: int = 1
    interval: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """Another tool's training command with its options.

    Attributes:
        name: the tool, for messages.
        model: its model's directory.
        place: its folder for trained weights.
        quantizer: of its own options; None: there is none.
        options: the options in the tool's own form, for the engine that read them.
    """

    name: str
    model: Path
    place: Path
    quantizer: Quantizer | None
    options: Any


class RunsCommands(Trains, Protocol):
    """Training commands of other tools, on this engine's models."""

    def read_command(self, arguments: Sequence[str]) -> Command:
        """The command that takes `arguments`: it is mlx-lm-lora's if they have an option that only it has, else mlx-lm's.

        Raises:
            RunError: the command refuses its arguments.
            BackendError: the command is not installed.
        """
        ...

    def run_command(
        self,
        command: Command,
        model: Path,
        place: Path,
        prepare: Callable[[Any], Any],
        follow: Callable[[Any], Callable[[int], None]] | None,
    ) -> Any:
        """The model in the directory `model`, trained by `command` without its own quantizer. `prepare` comes before training.

        Args:
            place: a folder for the command's own files.
            follow: makes, of the model that trains, a function to call with the number of each step, before it.

        Raises:
            RunError: the command cannot train this model.
        """
        ...
