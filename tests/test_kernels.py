"""The CUDA kernels without CUDA: Triton's interpreter runs them, in a process of its own, beside the reference."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the torch extra is not installed")
pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")

SCRIPT = Path(__file__).parent / "interpreted.py"


@pytest.mark.parametrize(
    "dtype", ["bfloat16"]
)  # the other types differ in how they are read; they are compared on GPUs
def test_kernels_are_the_reference_bit_for_bit(dtype):
    done = subprocess.run([sys.executable, str(SCRIPT), dtype], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 35
    assert [line for line in lines if not line.endswith(" exact")] == []
