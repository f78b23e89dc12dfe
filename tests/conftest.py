"""Makes the modules beside the tests importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), *map(str, Path(__file__).parent.glob("**/"))]

collect_ignore = ["plugins"]  # distributions of their own: test_plugins.py installs and runs them
