"""What training on a grid was worth, and what deploying on another takes away: computed, drawn, and written as one page."""

from qkit.report.code_changes import Move, moves
from qkit.report.comparison import Sources, compare
from qkit.report.deployments import matrix
from qkit.report.findings import Comparison, Measured, Premium
from qkit.report.intervals import Estimate, mean, recovered
from qkit.report.origin import About, about, to_json
from qkit.report.web_page import page, write

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
