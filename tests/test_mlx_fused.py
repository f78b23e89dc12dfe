"""The arithmetic of the one-pass kernels, compiled for the processor: it cannot run on a GPU here, but it can be wrong here."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="the mlx extra is not installed")

from qkit_mlx import fused_source

from qkit import Grid, reference
from qkit.qtensor import DTYPES
from qkit.testing import all_grids, random, tensors

COMPILER = shutil.which("c++") or shutil.which("g++")
if COMPILER is None:
    pytest.skip("there is no C++ compiler here", allow_module_level=True)

GRIDS = [grid for grid in all_grids() if grid.group != "tensor"]
MACROS = """
#include <cmath>
#include <cstring>
#define QKIT_INLINE static inline
static inline unsigned QKIT_BITS(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
static inline float QKIT_FLOAT(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
#define QKIT_ADD(x, y) ((x) + (y))
#define QKIT_MULTIPLY(x, y) ((x) * (y))
#define QKIT_DIVIDE(x, y) ((x) / (y))
#define QKIT_ROUND std::nearbyintf
"""
ROUND_GROUPS = """
extern "C" void NAME_groups(const float* x, float* out, long groups, long size, float peak) {
  for (long g = 0; g < groups; g++, x += size, out += size) {
    unsigned high = 0, low = 0;
    for (long i = 0; i < size; i++) NAME::see(high, low, x[i]);
    const NAME::Step step = NAME::step_of(high, low, peak);
    for (long i = 0; i < size; i++) out[i] = NAME::value(x[i], step);
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    parts = [
        fused_source.arithmetic(grid) + ROUND_GROUPS.replace("NAME", fused_source.name(grid)) for grid in set(GRIDS)
    ]
    (folder / "all.cpp").write_text(MACROS + "".join(parts))
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC", "-Wall"]
    subprocess.run([*command, "-Werror", "-o", folder / "all.so", folder / "all.cpp"], check=True)
    return ctypes.CDLL(str(folder / "all.so"))


def rounded(library, x, grid):
    """What the kernel makes of `x` [..., n], up to the last cast."""
    wide = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(wide)
    groups = int(np.prod(grid.scale_shape(x.shape)))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (wide, out)]
    function = getattr(library, f"{fused_source.name(grid)}_groups")
    peak = ctypes.c_float(np.abs(wide).max())
    function(*pointers, ctypes.c_long(groups), ctypes.c_long(wide.size // groups), peak)
    with np.errstate(over="ignore"):
        return out.astype(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_arithmetic_of_the_kernel_is_the_references(library, grid, dtype):
    given = {**tensors(grid, dtype), "random": random((64, 384), 1, dtype)}
    for name, x in given.items():
        want = reference.fake_quantize(x, grid)
        got = rounded(library, x, grid)
        wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
        assert not wrong.any(), (
            f"{name}: {wrong.sum()} of {wrong.size}, {x[wrong][:3]} {got[wrong][:3]} {want[wrong][:3]}"
        )


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_that_holds_no_number_gives_none(library, grid, bad):
    x = random((2, 128), 3)
    x[1, 5] = bad
    with np.errstate(all="ignore"):
        want = reference.fake_quantize(x, grid)
    assert np.isnan(want).any()
    assert np.array_equal(rounded(library, x, grid), want, equal_nan=True)


def test_every_kernel_has_its_own_name():
    assert len({fused_source.name(grid) for grid in all_grids()}) == len({str(grid) for grid in all_grids()})
    assert Grid("int4", "row") in GRIDS
