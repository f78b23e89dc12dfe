"""What every test directory shares. The helpers beside this file are importable: `pythonpath` in pyproject.toml."""

collect_ignore = ["plugins"]  # distributions of their own: test_plugins.py installs and runs them
