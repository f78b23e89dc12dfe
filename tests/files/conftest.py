"""For tests of files."""

import checkpoints
import pytest


@pytest.fixture
def folder(tmp_path):
    """A sound directory of one file."""
    return checkpoints.whole(tmp_path / "in")
