"""Whole models in other programs' layouts: import, export and comparison."""
