"""What training on a grid was worth, and what deploying on another takes away: computed, drawn, and written as one page."""

from qkit.report.comparison import Sources, compare
from qkit.report.findings import Comparison
from qkit.report.intervals import Estimate, mean, recovered
from qkit.report.matrix import matrix
from qkit.report.moves import Move, moves
from qkit.report.page import page

__all__ = ["Comparison", "Estimate", "Move", "Sources", "compare", "matrix", "mean", "moves", "page", "recovered"]
