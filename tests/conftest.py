"""For every test: one thread for each library in each worker.

The helpers beside this file are importable: `pythonpath` in pyproject.toml.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy, torch or MLX; their processes inherit it
os.environ.pop(
    "COLUMNS", None
)  # pytest-xdist gives its workers 80: output then is as wide as of other programs in a pipe

collect_ignore = ["plugins"]  # distributions of their own: test_plugins.py installs and runs them
