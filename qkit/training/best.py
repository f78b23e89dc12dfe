"""The best evaluation of a run, and the evaluations without a better one: pure functions of the evaluations so far."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Evaluations = Sequence[tuple[int, float]]  #: each the number of steps before it, and its loss


def evaluations_of(events: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The evaluations among the events of a log, in order."""
    return [(event["step"], event["loss"]) for event in events if event["event"] == "evaluation"]


def best_step(evaluations: Evaluations, *, until: int | None = None) -> int | None:
    """The step with the lowest loss up to step `until`, the first of equal ones; None where no loss is a number."""
    best: tuple[int, float] | None = None
    for step, loss in evaluations:
        if (until is None or step <= until) and loss == loss and (best is None or loss < best[1]):
            best = step, loss
    return best[0] if best else None


def waited(evaluations: Evaluations, *, first: int, threshold: float) -> int:
    """How many evaluations there were since the last one that was lower than all before it by more than `threshold`.

    Counts those from step `first` on, the first that trains on the recipe's grid. This is the count of transformers'
    `EarlyStoppingCallback`, except that an evaluation before the first step is one to improve on.
    """
    best, count = float("inf"), 0
    for step, loss in evaluations:
        count = 0 if best - loss > threshold else count + (step >= first)
        best = min(best, loss) if loss == loss else best
    return count
