"""For every test of torch: no code that another test compiled."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_compiled_code():
    """torch gives up after eight compilations of one code object, such as `Sequential.forward`."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()
