"""The loss of a model on a text, and its divergence from a teacher, computed in NumPy from the logits of any engine."""

from qkit.evaluation.measure import Evaluation, consecutive, evaluate
from qkit.evaluation.opening import open_model, read_alike

__all__ = ["Evaluation", "consecutive", "evaluate", "open_model", "read_alike"]
