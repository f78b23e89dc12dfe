"""For every test: one thread for each library in each worker, and folders that all workers share.

The helpers beside this file are importable: `pythonpath` in pyproject.toml.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy, torch or MLX; their processes inherit it

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

collect_ignore = ["plugins"]  # distributions of their own: test_plugins.py installs and runs them


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A function that makes a folder once in a session, whichever worker needs it first.

    `shared(name, make)` calls `make(folder)` the first time and returns the folder; nobody may write to it later.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # that of the whole session

    def once(name, make):
        folder, new = root / f"shared-{name}", root / f"shared-{name}-new"
        with FileLock(root / f"shared-{name}.lock"):
            if not folder.exists():
                new.mkdir()
                make(new)
                new.rename(folder)
        return folder

    return once
