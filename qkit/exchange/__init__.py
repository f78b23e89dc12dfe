"""Whole models in other programs' layouts: import, export and comparison. No code is ever changed."""
