"""The gain of training on a grid, and the cost of deploying on another: computed, drawn, and written as one page."""

from qkit.report.about import About, describe_source, to_json
from qkit.report.code_changes import CodeChange, compare_codes
from qkit.report.comparison import Sources, compare
from qkit.report.findings import Comparison, Measured, Premium
from qkit.report.intervals import Estimate, mean, recovered
from qkit.report.matrix import evaluate_matrix
from qkit.report.page import render_page, write

__all__ = [
    "About",
    "CodeChange",
    "Comparison",
    "Estimate",
    "Measured",
    "Premium",
    "Sources",
    "compare",
    "compare_codes",
    "describe_source",
    "evaluate_matrix",
    "mean",
    "recovered",
    "render_page",
    "to_json",
    "write",
]
