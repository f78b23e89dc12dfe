"""What a model makes of a text: loss, and how far it is from a teacher. Computed here, from logits, on any engine."""

from qkit.evaluation.measure import Evaluation, consecutive, evaluate
from qkit.evaluation.opening import open_model, read_alike

__all__ = ["Evaluation", "consecutive", "evaluate", "open_model", "read_alike"]
