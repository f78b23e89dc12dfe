"""What training on a grid was worth, and what deploying on another takes away: computed, drawn, and written as one page."""

from qkit.report.about import About, about, to_json
from qkit.report.comparison import Sources, compare
from qkit.report.findings import Comparison, Measured, Premium
from qkit.report.intervals import Estimate, mean, recovered
from qkit.report.matrix import matrix
from qkit.report.moves import Move, moves
from qkit.report.page import page, write

__all__ = [
    "About",
    "Comparison",
    "Estimate",
    "Measured",
    "Move",
    "Premium",
    "Sources",
    "about",
    "compare",
    "matrix",
    "mean",
    "moves",
    "page",
    "recovered",
    "to_json",
    "write",
]
