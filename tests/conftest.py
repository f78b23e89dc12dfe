"""Makes the modules beside the tests importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ["plugins"]  # distributions of their own: test_plugins.py installs and runs them
