"""The source of the one-pass kernels, compiled for the processor: it cannot run on a GPU here, but it can be wrong here.

The arithmetic runs on every grid; whole kernels on some, a thread for every thread of a block.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")

from qkit_mlx.kernels import cuda, cuda_source

from qkit import Grid, reference
from qkit.element import STEP, Element, reciprocal
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
#define QKIT_FMA std::fma
#define QKIT_DIVIDE(x, y) ((x) / (y))
#define QKIT_ROUND std::nearbyintf
#define QKIT_LEAST std::fmin
#define QKIT_MOST std::fmax
"""
ROUND_GROUPS = """
extern "C" void NAME_groups(const float* x, float* out, long groups, long size, float peak, int narrow) {
  for (long g = 0; g < groups; g++, x += size, out += size) {
    unsigned high = 0, low = 0;
    for (long i = 0; i < size; i++) NAME::see(high, low, x[i]);
    const NAME::Step step = NAME::step_of(high, low, peak);
    for (long i = 0; i < size; i++) out[i] = NAME::value(x[i], step, narrow);
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    parts = [cuda_source.arithmetic(grid) + ROUND_GROUPS.replace("NAME", cuda_source.name(grid)) for grid in set(GRIDS)]
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
    function = getattr(library, f"{cuda_source.name(grid)}_groups")
    peak = ctypes.c_float(np.abs(wide).max())
    function(
        *pointers, ctypes.c_long(groups), ctypes.c_long(wide.size // groups), peak, ctypes.c_int(x.dtype.itemsize == 2)
    )
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


@pytest.mark.parametrize("rule", ["signed", "minmax"])
def test_an_element_that_the_tables_gain_has_the_values_of_the_reference(rule, tmp_path, monkeypatch):
    """The source declares every integer of up to 8 bits, and so computes a width that qkit does not have yet."""
    element = Element("int7", "integer", 7, 63)
    monkeypatch.setitem(STEP, ("int7", rule), 1 / element.lowest if rule == "signed" else reciprocal(element.levels))
    grid = Grid(element, 64, rule)
    assert cuda_source.declares(grid)
    text = MACROS + cuda_source.arithmetic(grid) + ROUND_GROUPS.replace("NAME", cuda_source.name(grid))
    (tmp_path / "one.cpp").write_text(text)
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", tmp_path / "one.so", tmp_path / "one.cpp"], check=True)
    made = ctypes.CDLL(str(tmp_path / "one.so"))
    for dtype in DTYPES:
        x = random((64, 384), 1, dtype)
        assert np.array_equal(rounded(made, x, grid), reference.fake_quantize(x, grid))


def test_every_kernel_has_its_own_name():
    assert len({cuda_source.name(grid) for grid in all_grids()}) == len({str(grid) for grid in all_grids()})
    assert Grid("int4", "row") in GRIDS


THREADS = """
#include <barrier>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>
#define __shared__ static
struct Place { unsigned x; };
thread_local Place threadIdx, blockIdx, blockDim;
unsigned slots[32][32];
std::vector<std::unique_ptr<std::barrier<>>> warps;
std::unique_ptr<std::barrier<>> block;
void __syncthreads() { block->arrive_and_wait(); }
unsigned __shfl_xor_sync(unsigned, unsigned value, int offset) {
  unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  slots[warp][lane] = value;
  warps[warp]->arrive_and_wait();
  unsigned other = slots[warp][lane ^ offset];
  warps[warp]->arrive_and_wait();
  return other;
}
template <typename F> void launch(unsigned blocks, unsigned threads, F kernel) {
  for (unsigned b = 0; b < blocks; b++) {
    warps.clear();
    for (unsigned i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<std::barrier<>>(32));
    block = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; t++)
      running.emplace_back([=] { blockIdx = {b}; blockDim = {threads}; threadIdx = {t}; kernel(); });
    for (auto& thread : running) thread.join();
  }
}
"""
WHOLE = """
extern "C" void NAME(const TYPE* w, TYPE* out, const float* peak, const int* w_shape, int blocks, int threads) {
  launch(blocks, threads, [=] {
    using T = TYPE;
BODY
  });
}
"""
TYPES = {"float32": "float", "float16": "_Float16"}
#: Grids and shapes for: part of a warp to a group, the last block half empty; a warp, several vectors to a thread; a block to a
#: group; and no vectors, since groups are odd.
WHOLES = [
    (Grid(element, group, rule), shape, dtype)
    for element, rule in (("int4", "signed"), ("int4", "minmax"), ("e4m3", "rceil"))
    for group, shape in ((64, (7, 192)), ("row", (3, 1024)), ("row", (2, 3000)), ("row", (3, 35)))
    for dtype in TYPES
] + [(Grid("e2m1", 16, "nvfp4"), (7, 192), dtype) for dtype in TYPES]


def launched(grid, shape, dtype):
    size = int(np.prod(shape))
    return cuda.launch(size // int(np.prod(grid.scale_shape(shape))), size, np.dtype(dtype).itemsize)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    parts = [MACROS, THREADS]
    for grid in dict.fromkeys(grid for grid, _, _ in WHOLES):
        vectors = f"namespace {cuda_source.name(grid)} {{{cuda_source.VECTORS}}}\n"
        parts += [cuda_source.arithmetic(grid), vectors]
    for i, (grid, shape, dtype) in enumerate(WHOLES):
        run = launched(grid, shape, dtype)
        constants = "".join(f"constexpr int {name} = {number};\n" for name, number in run.constants.items())
        whole = WHOLE.replace("NAME", f"run_{i}").replace("TYPE", TYPES[dtype])
        parts.append(whole.replace("BODY", constants + cuda_source.body(grid, run.template)))
    (folder / "kernels.cpp").write_text("".join(parts))
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.mark.parametrize("i", range(len(WHOLES)), ids=[f"{grid}-{shape}-{dtype}" for grid, shape, dtype in WHOLES])
def test_the_threads_of_a_kernel_share_the_work(kernels, i):
    grid, shape, dtype = WHOLES[i]
    x = random(shape, 1, dtype)
    out = np.full_like(x, np.nan)
    peak, size = np.abs(x).max().astype(np.float32)[None], np.array([x.size], np.int32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, out, peak, size)]
    run = launched(grid, shape, dtype)
    getattr(kernels, f"run_{i}")(*pointers, ctypes.c_int(run.threads // run.block), ctypes.c_int(run.block))
    assert np.array_equal(out, reference.fake_quantize(x, grid))
